#pragma once

#include <cstdint>

#include "enums.h"
#include "pyfast_xai/portable.h"

// The receptive-field geometry of a convolution, independent of torch and Python.
namespace pyfast_xai {

inline constexpr int kSpatial = 3;

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

PYFAST_XAI_HD inline int64_t ravel_input(const Convolution& conv, int64_t image, int64_t channel, const int64_t* at) {
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
  const int64_t middle = location == Location::CENTER ? conv.dilation[d] * (conv.kernel[d] / 2) - conv.padding[d] : 0;
  return clamp_to_input(conv, d, at * conv.stride[d] + middle);
}

// The part of a receptive field that lies inside the input.
struct Window {
  int64_t start[kSpatial];
  TapRange inside[kSpatial];

  PYFAST_XAI_HD int64_t extent(int d) const { return inside[d].end - inside[d].begin; }
  PYFAST_XAI_HD int64_t taps() const { return extent(0) * extent(1) * extent(2); }
};

PYFAST_XAI_HD inline Window window_of(const Convolution& conv, const OutputPoint& point) {
  Window window;
  for (int d = 0; d < kSpatial; ++d) {
    window.start[d] = window_start(conv, d, point.at[d]);
    window.inside[d] = taps_inside(conv, d, window.start[d]);
  }
  return window;
}

struct Tap {
  int64_t kernel[kSpatial];
  int64_t at[kSpatial];  // in the input
};

PYFAST_XAI_HD inline Tap tap_at(const Convolution& conv, const Window& window, int64_t i, int64_t j, int64_t k) {
  return {{i, j, k},
          {window.start[0] + i * conv.dilation[0], window.start[1] + j * conv.dilation[1],
           window.start[2] + k * conv.dilation[2]}};
}

// The n-th of the taps inside, in row-major order.
PYFAST_XAI_HD inline Tap nth_tap(const Convolution& conv, const Window& window, int64_t n) {
  const int64_t row = n / window.extent(2);
  return tap_at(conv, window, window.inside[0].begin + row / window.extent(1),
                window.inside[1].begin + row % window.extent(1), window.inside[2].begin + n % window.extent(2));
}

PYFAST_XAI_HD inline int64_t first_channel(const Convolution& conv, int64_t filter) {
  return filter / conv.group_filters * conv.group_channels;
}

// Computes the place of the point if it does not depend on values; returns false if it does.
PYFAST_XAI_HD inline bool place_without_values(const Convolution& conv, const OutputPoint& point, const Window& window,
                                               Location location, int64_t* at) {
  const bool fixed = location == Location::CENTER || location == Location::SAME;
  // A window that lies in the padding: its first tap, brought to the border.
  if (!fixed && window.taps() > 0) return false;
  for (int d = 0; d < kSpatial; ++d) {
    at[d] = fixed ? fixed_coordinate(conv, d, point.at[d], location) : clamp_to_input(conv, d, window.start[d]);
  }
  return true;
}

// The taps that compete for the place of a point.
template <class T>
PYFAST_XAI_HD inline T tap_value(Location location, T activation, T weight, T sign) {
  return location == Location::ACTIVATION ? activation : sign * (activation * weight);
}

// Steps in memory of a tensor [N, C, d, h, w] or [O, C, d, h, w].
struct Strides {
  int64_t outer, channel;
  int64_t spatial[kSpatial];

  PYFAST_XAI_HD int64_t offset(const int64_t* at) const {
    return at[0] * spatial[0] + at[1] * spatial[1] + at[2] * spatial[2];
  }
};

}  // namespace pyfast_xai
