#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cstdint>

namespace pyfast_xai {

// Whether there is a point: -1 is none. One outside [0, size) is an assertion of the device, as in torch's own
// indexing: the host hears of it when it next waits, and nothing waits here. Where assertions are compiled out, it is
// none, too.
__device__ inline bool is_point(int64_t point, int64_t size) {
  CUDA_KERNEL_ASSERT(point >= -1 && point < size && "points must lie in [0, size) or be -1");
  return point >= 0 && point < size;
}

}  // namespace pyfast_xai
