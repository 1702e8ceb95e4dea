#pragma once

#include <cstdint>

#include "checks.h"

namespace pyfast_xai {

// Whether [N, C, H, W] lies in memory plane by plane or pixel by pixel; where a dimension is 1 it may be both.
struct Layout {
  bool planes = true, pixels = true;

  explicit Layout(const Tensor& tensor) {
    const int64_t channels = tensor.size(1), height = tensor.size(2), width = tensor.size(3);
    const int64_t image = channels * height * width;
    const int64_t by_plane[4] = {image, height * width, width, 1}, by_pixel[4] = {image, 1, width * channels, channels};
    for (int d = 0; d < 4; ++d) {
      if (tensor.size(d) <= 1 || tensor.numel() == 0) continue;
      planes &= tensor.stride(d) == by_plane[d];
      pixels &= tensor.stride(d) == by_pixel[d];
    }
  }
};

}  // namespace pyfast_xai
