#pragma once

#include <cstdint>

#include "pyfast_xai/portable.h"

// The receptive-field geometry of a convolution. Knows neither torch nor Python.
namespace pyfast_xai {

inline constexpr int kSpatial = 3;

// Where in its receptive field a point lands; `ops.conv_trace.Location` on the Python side.
enum class Location : int64_t { kProduct = 0, kCenter = 1, kActivation = 2, kSame = 3 };

// One and two dimensional convolutions are padded with leading dimensions of size one.
struct Convolution {
  int64_t images, channels, filters;
  int64_t group_channels, group_filters;
  int64_t spatial[kSpatial], output[kSpatial], kernel[kSpatial];
  int64_t stride[kSpatial], padding[kSpatial], dilation[kSpatial];

  PYFAST_XAI_HD int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  PYFAST_XAI_HD int64_t positions() const { return spatial[0] * spatial[1] * spatial[2]; }
  PYFAST_XAI_HD int64_t outputs() const { return output[0] * output[1] * output[2]; }
};

struct OutputPoint {
  int64_t image, filter;
  int64_t at[kSpatial];
};

PYFAST_XAI_HD inline OutputPoint unravel_output(const Convolution& conv, int64_t flat) {
  OutputPoint point;
  for (int d = kSpatial - 1; d >= 0; --d) {
    point.at[d] = flat % conv.output[d];
    flat /= conv.output[d];
  }
  point.filter = flat % conv.filters;
  point.image = flat / conv.filters;
  return point;
}

PYFAST_XAI_HD inline int64_t ravel_input(const Convolution& conv, int64_t image, int64_t channel,
                                         const int64_t* at) {
  int64_t flat = image * conv.channels + channel;
  for (int d = 0; d < kSpatial; ++d) flat = flat * conv.spatial[d] + at[d];
  return flat;
}

PYFAST_XAI_HD inline int64_t window_start(const Convolution& conv, int d, int64_t at) {
  return at * conv.stride[d] - conv.padding[d];
}

PYFAST_XAI_HD inline int64_t clamp_to_input(const Convolution& conv, int d, int64_t coordinate) {
  const int64_t last = conv.spatial[d] - 1;
  return coordinate < 0 ? 0 : coordinate > last ? last : coordinate;
}

// The taps of dimension d that lie inside the input: [begin, end), possibly empty.
struct TapRange {
  int64_t begin, end;
};

PYFAST_XAI_HD inline TapRange taps_inside(const Convolution& conv, int d, int64_t start) {
  const int64_t step = conv.dilation[d];
  const int64_t begin = start >= 0 ? 0 : (-start + step - 1) / step;
  if (start >= conv.spatial[d]) return {0, 0};
  const int64_t fit = (conv.spatial[d] - 1 - start) / step + 1;
  const int64_t end = fit < conv.kernel[d] ? fit : conv.kernel[d];
  return {begin, end < begin ? begin : end};
}

// The coordinate that CENTER and SAME choose without looking at values.
PYFAST_XAI_HD inline int64_t fixed_coordinate(const Convolution& conv, int d, int64_t at, Location location) {
  const int64_t middle =
      location == Location::kCenter ? conv.dilation[d] * (conv.kernel[d] / 2) - conv.padding[d] : 0;
  return clamp_to_input(conv, d, at * conv.stride[d] + middle);
}

// The order of torch.argmax: a NaN beats every number, the first of equals wins.
template <class T>
PYFAST_XAI_HD inline bool beats(T candidate, T best) {
  return candidate > best || (candidate != candidate && best == best);
}

}  // namespace pyfast_xai
