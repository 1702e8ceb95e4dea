#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/layout.h"
#include "dispatch.h"

namespace pyfast_xai {

// A two-dimensional pool. In either memory format an image is `lanes` numbers a pixel: all channels where they lie
// innermost, one where each channel is a plane of its own and counts as an image.
struct Pool {
  int64_t images, lanes;
  int64_t input[2], output[2];
  int64_t kernel[2], stride[2], padding[2], dilation[2];

  int64_t input_size() const { return input[0] * input[1] * lanes; }
  int64_t output_size() const { return output[0] * output[1] * lanes; }
};

// The taps of a window that lie inside the input, along one dimension: [begin, end).
struct Taps {
  int64_t start, begin, end;

  Taps(const Pool& pool, int d, int64_t at) : start(at * pool.stride[d] - pool.padding[d]) {
    const int64_t step = pool.dilation[d];
    begin = start < 0 ? (-start + step - 1) / step : 0;
    end = std::min(pool.kernel[d], (pool.input[d] - start + step - 1) / step);
  }
};

inline Pool pool_of(const Tensor& input, const char* input_name, const Tensor& output, const char* output_name,
                    const Tensor& offsets, const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  check(input.dim() == 4, input_name, " must have shape [N, C, H, W], got ", ShapeOf{input});
  check(output.dim() == 4 && output.size(0) == input.size(0) && output.size(1) == input.size(1), output_name,
        " must have shape [", input.size(0), ", ", input.size(1), ", H', W'], got ", ShapeOf{output});
  check_dtype(output, output_name, input.scalar_type());
  check_dtype(offsets, "offsets", ScalarType::Byte);
  bool fits = offsets.dim() == 4 && (offsets.size(0) > 0 ? output.size(0) % offsets.size(0) == 0 : output.size(0) == 0);
  for (int d = 1; fits && d < 4; ++d) fits = offsets.size(d) == output.size(d);
  check(fits, "offsets must have shape [N, ", output.size(1), ", ", output.size(2), ", ", output.size(3), "], got ",
        ShapeOf{offsets});
  const Layout outer(input), inner(output), places(offsets);
  const bool pixels = outer.pixels && inner.pixels && places.pixels;
  check(pixels || (outer.planes && inner.planes && places.planes), input_name, ", ", output_name,
        " and offsets must be all contiguous or all channels_last, got others");
  Pool pool{};
  pool.images = pixels ? input.size(0) : input.size(0) * input.size(1);
  pool.lanes = pixels ? input.size(1) : 1;
  const auto fill = [](int64_t* to, const std::vector<int64_t>& values, int64_t least, const char* name) {
    using List = std::vector<int64_t>;
    check(values.size() == 2 && values[0] >= least && values[1] >= least, name, " must be 2 numbers of at least ",
          least, ", got ", Listed<List>{values});
    to[0] = values[0], to[1] = values[1];
  };
  fill(pool.kernel, kernel, 1, "kernel");
  fill(pool.stride, stride, 1, "stride");
  fill(pool.padding, padding, 0, "padding");
  fill(pool.dilation, dilation, 1, "dilation");
  check(kernel[0] * kernel[1] <= 256, "kernel must have at most 256 taps, which a byte can tell apart, got ",
        kernel[0] * kernel[1]);
  for (int d = 0; d < 2; ++d) {
    pool.input[d] = input.size(2 + d), pool.output[d] = output.size(2 + d);
    // Every window must reach into the input.
    if (output.numel() == 0) continue;
    const Taps first(pool, d, 0), last(pool, d, pool.output[d] - 1);
    check(first.begin < first.end && last.begin < last.end, output_name, " must have windows inside the input, got ",
          ShapeOf{output}, " for ", ShapeOf{input});
  }
  return pool;
}

}  // namespace pyfast_xai
