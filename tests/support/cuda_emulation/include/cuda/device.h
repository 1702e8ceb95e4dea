#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/macros/Macros.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "arguments.h"

#undef CUDA_KERNEL_ASSERT
#define CUDA_KERNEL_ASSERT(condition) \
  if (!(condition)) ::emulated::fail("device assertion failed: " #condition)

// Stands in for csrc/cuda/device.h: the "device" is the memory of the host.
namespace pyfast_xai {

enum Copy { cudaMemcpyDeviceToHost };

inline int cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return 0;
}

inline int cudaMemcpyAsync(void* to, const void* from, size_t bytes, Copy, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return 0;
}

inline int cudaStreamSynchronize(cudaStream_t) { return 0; }
inline void check_cuda(int, const char*) {}
inline void check_launch(const char*) {}
inline void check_same_device(const Tensor&, const char*, const Tensor&, const char*) {}

class DeviceScope {
 public:
  explicit DeviceScope(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
};

// Few blocks, so that grid-stride loops take several turns.
inline unsigned blocks_for(int64_t tasks, int64_t per_block) {
  return static_cast<unsigned>(std::min<int64_t>((tasks + per_block - 1) / per_block, 5));
}

}  // namespace pyfast_xai

namespace emulated {

inline int64_t bytes_of(const torch::stable::Tensor& tensor) {
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  return tensor.numel() == 0 ? 0 : (last + 1) * static_cast<int64_t>(tensor.element_size());
}

// The memory of a tensor that is passed to a kernel, which may access it.
inline void* data_of(const torch::stable::Tensor& tensor) {
  void* data = tensor.data_ptr();
  allow(data, bytes_of(tensor));
  return data;
}

// Memory that nobody has written holds a pattern that no result can hold by chance.
inline torch::stable::Tensor new_empty(const torch::stable::Tensor& like, const std::vector<int64_t>& size,
                                       torch::headeronly::ScalarType dtype) {
  auto tensor = torch::stable::new_empty(like, size, dtype);
  std::memset(tensor.data_ptr(), 0xA5, bytes_of(tensor));
  return tensor;
}

}  // namespace emulated
