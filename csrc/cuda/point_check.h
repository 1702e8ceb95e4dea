#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cstdint>

namespace pyfast_xai {

// Returns whether `point` is one: -1 stands for none. A point outside [0, size) fails an assertion of the device, as in
// torch's own indexing, which the host sees at its next synchronisation. Where assertions are compiled out, it counts
// as none.
__device__ inline bool is_point(int64_t point, int64_t size) {
  CUDA_KERNEL_ASSERT(point >= -1 && point < size && "points must lie in [0, size) or be -1");
  return point >= 0 && point < size;
}

}  // namespace pyfast_xai
