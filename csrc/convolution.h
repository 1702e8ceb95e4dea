#pragma once

#include <vector>

#include "checks.h"
#include "pyfast_xai/window.h"

// The arguments of a convolution, checked and brought to three spatial dimensions.
namespace pyfast_xai {

inline Strides strides_of(const Tensor& tensor) {
  Strides strides{tensor.stride(0), tensor.stride(1), {}};
  const int64_t missing = kSpatial + 2 - tensor.dim();
  for (int64_t d = missing; d < kSpatial; ++d) strides.spatial[d] = tensor.stride(d - missing + 2);
  return strides;
}

inline void fill_spatial(int64_t* padded, const std::vector<int64_t>& values, int64_t missing_value, const char* name,
                  int64_t least) {
  for (int d = 0; d < kSpatial; ++d) padded[d] = missing_value;
  const size_t missing = kSpatial - values.size();
  for (size_t d = 0; d < values.size(); ++d) {
    check(values[d] >= least, name, " must be at least ", least, " in every dimension, got ",
          Listed<std::vector<int64_t>>{values});
    padded[missing + d] = values[d];
  }
}

inline Convolution convolution_of(const Tensor& input, const Tensor& weight, const std::vector<int64_t>& output_size,
                           const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                           const std::vector<int64_t>& dilation, int64_t groups) {
  const int64_t spatial = input.dim() - 2;
  check(spatial >= 1 && spatial <= kSpatial, "input must have shape [N, C, *spatial] with one to three spatial "
        "dimensions, got ", ShapeOf{input});
  check(weight.dim() == input.dim(), "weight must have shape [O, C / groups, *kernel] with ", spatial,
        " kernel dimensions, got ", ShapeOf{weight});
  check_dtype(weight, "weight", input.scalar_type());
  check(groups >= 1 && input.size(1) == weight.size(1) * groups && weight.size(0) % groups == 0,
        "groups must divide input of shape ", ShapeOf{input}, " and weight of shape ", ShapeOf{weight},
        " into matching channels, got ", groups);
  const auto check_length = [&](const std::vector<int64_t>& values, const char* name) {
    check(static_cast<int64_t>(values.size()) == spatial, name, " must have ", spatial, " entries, got ",
          Listed<std::vector<int64_t>>{values});
  };
  check_length(output_size, "output_size");
  check_length(stride, "stride");
  check_length(padding, "padding");
  check_length(dilation, "dilation");

  const auto sizes = input.sizes(), kernel = weight.sizes();
  Convolution conv{};
  conv.images = sizes[0];
  conv.channels = sizes[1];
  conv.filters = kernel[0];
  conv.group_channels = kernel[1];
  conv.group_filters = kernel[0] / groups;
  fill_spatial(conv.spatial, {sizes.begin() + 2, sizes.end()}, 1, "input size", 0);
  fill_spatial(conv.kernel, {kernel.begin() + 2, kernel.end()}, 1, "kernel size", 0);
  fill_spatial(conv.output, output_size, 1, "output_size", 0);
  fill_spatial(conv.stride, stride, 1, "stride", 1);
  fill_spatial(conv.padding, padding, 0, "padding", 0);
  fill_spatial(conv.dilation, dilation, 1, "dilation", 1);
  return conv;
}

inline Location location_of(int64_t location) {
  check(location >= 0 && location <= static_cast<int64_t>(Location::kSame), "location must be 0, 1, 2 or 3, got ",
        location);
  return static_cast<Location>(location);
}

// A tensor without elements has no place for a point.
inline void check_not_empty(const Tensor& input, const Tensor& weight) {
  check(input.numel() > 0 && weight.numel() > 0, "input and weight must not be empty, got shapes ", ShapeOf{input},
        " and ", ShapeOf{weight});
}

}  // namespace pyfast_xai
