#pragma once

#include <torch/csrc/stable/ops.h>

#include "cuda/device.h"

namespace pyfast_xai {

// The range check of points. The kernels that read them skip a point outside and note the lowest index of one; the
// host looks at the note when it fetches the size of the result anyway, so the check costs no synchronisation of its
// own. Results of a call that noted something are thrown away.
using PointNote = unsigned long long;

inline constexpr PointNote kAllInside = ~PointNote{0};

__device__ inline bool is_inside(const int64_t* points, int64_t index, int64_t size, PointNote* note) {
  if (points[index] >= 0 && points[index] < size) return true;
  atomicMin(note, static_cast<PointNote>(index));
  return false;
}

// What a call reads back in one copy.
struct Outcome {
  PointNote outside;
  int64_t total;  // places found, where the op finds out
};

class OutcomeOnDevice {
 public:
  OutcomeOnDevice(const Tensor& like, cudaStream_t stream)
      : memory_(torch::stable::new_empty(like, {sizeof(Outcome) / sizeof(int64_t)}, ScalarType::Long)),
        stream_(stream) {
    // All ones is `kAllInside`.
    check_cuda(cudaMemsetAsync(memory_.mutable_data_ptr(), 0xFF, sizeof(Outcome), stream), "clearing the outcome");
  }

  PointNote* note() const { return &on_device()->outside; }
  int64_t* total() const { return &on_device()->total; }

  // Waits for the stream. Throws if a point of the list [count] lies outside [0, size).
  Outcome wait(const int64_t* points, int64_t size) const {
    Outcome outcome;
    fetch(&outcome, on_device(), sizeof(outcome));
    if (outcome.outside != kAllInside) {
      int64_t point;
      fetch(&point, points + outcome.outside, sizeof(point));
      fail("points must lie in [0, ", size, "), got ", point);
    }
    return outcome;
  }

 private:
  Outcome* on_device() const { return static_cast<Outcome*>(memory_.mutable_data_ptr()); }

  void fetch(void* to, const void* from, size_t bytes) const {
    check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_), "fetching the outcome");
    check_cuda(cudaStreamSynchronize(stream_), "running the kernels");
  }

  Tensor memory_;
  cudaStream_t stream_;
};

}  // namespace pyfast_xai
