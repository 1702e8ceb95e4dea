#pragma once

#include <optional>

#include "checks.h"
#include "pyfast_xai/bits.h"

namespace pyfast_xai {

// Sizes of a fully connected layer [rows, columns] -> [rows, outputs] whose weight is rows of words of bits.
struct LinearLayer {
  int64_t rows, columns, outputs, words;
};

// The sizes of checked arguments of `linear_trace`.
inline LinearLayer linear_layer(const Tensor& input, const Tensor& weight_positive, const Tensor& weight_negative,
                                const Tensor& points, const std::optional<Tensor>& negative) {
  check(input.dim() == 2, "input must have shape [R, I], got ", ShapeOf{input});
  const int64_t rows = input.size(0), columns = input.size(1), words = words_for(columns);
  check_dtype(weight_positive, "weight_positive", ScalarType::Long);
  check_dtype(weight_negative, "weight_negative", ScalarType::Long);
  check(weight_positive.dim() == 2 && weight_positive.size(1) == words, "weight_positive must have shape [O, ", words,
        "] for inputs of ", columns, " features, got ", ShapeOf{weight_positive});
  const int64_t outputs = weight_positive.size(0);
  check(weight_negative.dim() == 2 && weight_negative.size(0) == outputs && weight_negative.size(1) == words,
        "weight_negative must have shape [", outputs, ", ", words, "] as weight_positive has, got ",
        ShapeOf{weight_negative});
  check_points(points);
  if (negative) check_negative(*negative, points);
  return {rows, columns, outputs, words};
}

}  // namespace pyfast_xai
