#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

// Messages are one sentence: the argument, what it must be, what came.
namespace pyfast_xai {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <class... Parts>
inline void check(bool holds, const Parts&... parts) {
  if (!holds) [[unlikely]]
    fail(parts...);
}

// Formats a list as "[1, 2, 3]", and only when a check fails.
template <class List>
struct Listed {
  const List& list;
};

template <class List>
std::ostream& operator<<(std::ostream& out, const Listed<List>& listed) {
  out << '[';
  for (size_t i = 0; i < listed.list.size(); ++i) out << (i ? ", " : "") << listed.list[i];
  return out << ']';
}

struct ShapeOf {
  const Tensor& tensor;
};

inline std::ostream& operator<<(std::ostream& out, const ShapeOf& shape) {
  const auto sizes = shape.tensor.sizes();
  return out << Listed<decltype(sizes)>{sizes};
}

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Bool: return "bool";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    default: return "another dtype";
  }
}

inline void check_dtype(const Tensor& tensor, const char* name, ScalarType expected) {
  check(tensor.scalar_type() == expected, name, " must be ", dtype_name(expected), ", got ",
        dtype_name(tensor.scalar_type()));
}

// Points are flat indices into `size` places.
inline void check_points(const Tensor& points, const char* name = "points") {
  check_dtype(points, name, ScalarType::Long);
  check(points.dim() == 1, name, " must have shape [P], got ", ShapeOf{points});
}

inline void check_inside(const int64_t* points, int64_t count, int64_t size) {
  for (int64_t i = 0; i < count; ++i) {
    check(points[i] >= 0 && points[i] < size, "points must lie in [0, ", size, "), got ", points[i]);
  }
}

// The same where -1 stands for no point.
inline void check_inside_or_absent(const int64_t* points, int64_t count, int64_t size) {
  for (int64_t i = 0; i < count; ++i) {
    check(points[i] >= -1 && points[i] < size, "points must lie in [0, ", size, ") or be -1, got ", points[i]);
  }
}

// Entries of a result that is filled up with -1; without, it has as many as there are points.
inline void check_capacity(const std::optional<int64_t>& capacity) {
  check(!capacity || *capacity >= 0, "capacity must not be negative, got ", capacity.value_or(0));
}

inline void check_negative(const Tensor& negative, const Tensor& points) {
  check_dtype(negative, "negative", ScalarType::Bool);
  check(negative.dim() == 1 && negative.size(0) == points.size(0), "negative must have shape [",
        points.size(0), "] as points have, got ", ShapeOf{negative});
}

}  // namespace pyfast_xai
