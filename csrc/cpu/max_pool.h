#pragma once

#include <algorithm>
#include <cstdint>

#include "arguments.h"
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

// The pool whose images and channels are those of `maps`.
inline Pool pool_of(const Tensor& maps, const Tensor& input, const Tensor& output, const checks::List& kernel,
                    const checks::List& stride, const checks::List& padding, const checks::List& dilation,
                    bool pixels) {
  Pool pool{};
  pool.images = pixels ? maps.size(0) : maps.size(0) * maps.size(1);
  pool.lanes = pixels ? maps.size(1) : 1;
  for (int d = 0; d < 2; ++d) {
    pool.input[d] = input.size(2 + d), pool.output[d] = output.size(2 + d);
    pool.kernel[d] = kernel.begin()[d], pool.stride[d] = stride.begin()[d];
    pool.padding[d] = padding.begin()[d], pool.dilation[d] = dilation.begin()[d];
  }
  return pool;
}

// Returns whether three maps lie in memory pixel by pixel; otherwise they lie plane by plane, the only other order that
// the kernels take.
inline bool pixels_follow(const Tensor& input, const Tensor& output, const Tensor& offsets) {
  const auto all = [&](auto follow) { return follow(input) && follow(output) && follow(offsets); };
  if (all([](const Tensor& map) { return checks::pixels_follow(map); })) return true;
  if (all([](const Tensor& map) { return checks::planes_follow(map); })) return false;
  fail("input, output and offsets of a pool must be all contiguous or all channels_last, got others");
}

}  // namespace pyfast_xai
