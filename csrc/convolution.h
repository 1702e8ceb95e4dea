#pragma once

#include <algorithm>
#include <vector>

#include "checks.h"
#include "pyfast_xai/window.h"

// The arguments of a convolution, brought to three spatial dimensions.
namespace pyfast_xai {

inline Strides strides_of(const Tensor& tensor) {
  Strides strides{tensor.stride(0), tensor.stride(1), {}};
  const int64_t missing = kSpatial + 2 - tensor.dim();
  for (int64_t d = missing; d < kSpatial; ++d) strides.spatial[d] = tensor.stride(d - missing + 2);
  return strides;
}

// Leading dimensions that are missing get the neutral value.
inline void fill_spatial(int64_t* padded, const checks::List& values, int64_t missing_value) {
  std::fill_n(padded, kSpatial, missing_value);
  std::copy_backward(values.begin(), values.end(), padded + kSpatial);
}

// The checked arguments of `conv_trace`.
inline Convolution convolution_of(const Tensor& input, const Tensor& weight, const std::vector<int64_t>& output_size,
                                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                  const std::vector<int64_t>& dilation, int64_t groups) {
  const auto sizes = input.sizes(), kernel = weight.sizes();
  Convolution conv{};
  conv.images = sizes[0];
  conv.channels = sizes[1];
  conv.filters = kernel[0];
  conv.group_channels = kernel[1];
  conv.group_filters = kernel[0] / groups;
  fill_spatial(conv.spatial, std::vector<int64_t>(sizes.begin() + 2, sizes.end()), 1);
  fill_spatial(conv.kernel, std::vector<int64_t>(kernel.begin() + 2, kernel.end()), 1);
  fill_spatial(conv.output, output_size, 1);
  fill_spatial(conv.stride, stride, 1);
  fill_spatial(conv.padding, padding, 0);
  fill_spatial(conv.dilation, dilation, 1);
  return conv;
}

}  // namespace pyfast_xai
