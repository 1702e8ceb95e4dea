#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cstdint>

#include "arguments.h"

namespace pyfast_xai {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) fail(what, " failed: ", cudaGetErrorString(error));
}

// Reports a bad launch configuration; an error in a running kernel shows at the next synchronisation.
inline void check_launch(const char* kernel) { check_cuda(cudaGetLastError(), kernel); }

// Makes the device of a tensor current for its lifetime, and holds torch's current stream of that device.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {
    // The guard works through torch's CUDA runtime; ours is linked statically and keeps its own record.
    check_cuda(cudaSetDevice(index_), "cudaSetDevice");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// Blocks for a grid-stride loop of `tasks` with `per_block` at a time.
inline unsigned blocks_for(int64_t tasks, int64_t per_block) {
  constexpr int64_t kMost = 1 << 16;
  return static_cast<unsigned>(std::min((tasks + per_block - 1) / per_block, kMost));
}

}  // namespace pyfast_xai
