#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

// The vocabulary of kernels/checks.py, from which csrc/generate.py makes checks.h; kernels/arguments.py has the same
// functions for Python.
namespace pyfast_xai {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

namespace checks {

using Text = std::string_view;

// An integer of 127 bits. A result that is too large for them stays the largest one, so that it is larger than all that
// an int64 can hold, and none wraps around.
class Int {
 public:
  constexpr Int(int64_t value) : value_(value) {}

  static constexpr Int power_of_two(int power) { return wide(Wide{1} << power); }

  friend constexpr Int operator+(Int a, Int b) {
    Wide sum;
    return __builtin_add_overflow(a.value_, b.value_, &sum) ? end(a.value_ < 0) : wide(sum);
  }
  friend constexpr Int operator-(Int a, Int b) { return a + -b; }
  friend constexpr Int operator*(Int a, Int b) {
    Wide product;
    return __builtin_mul_overflow(a.value_, b.value_, &product) ? end((a.value_ < 0) != (b.value_ < 0)) : wide(product);
  }
  constexpr Int operator-() const { return wide(-value_); }

  // Rounded down; the divisor is positive.
  friend constexpr Int quotient(Int a, Int b) { return wide((a.value_ - remainder(a, b).value_) / b.value_); }
  friend constexpr Int remainder(Int a, Int b) {
    const Wide rest = a.value_ % b.value_;
    return wide(rest < 0 ? rest + b.value_ : rest);
  }

  friend constexpr bool operator==(Int a, Int b) { return a.value_ == b.value_; }
  friend constexpr auto operator<=>(Int a, Int b) { return a.value_ <=> b.value_; }

  // The nearest int64.
  constexpr int64_t narrow() const {
    constexpr Wide least = std::numeric_limits<int64_t>::min(), largest = std::numeric_limits<int64_t>::max();
    return static_cast<int64_t>(std::clamp(value_, least, largest));
  }
  friend std::ostream& operator<<(std::ostream& out, Int number) { return out << number.narrow(); }

 private:
  __extension__ typedef __int128 Wide;

  static constexpr Int wide(Wide value) {
    Int number(0);
    number.value_ = value;
    return number;
  }
  static constexpr Int end(bool negative) {
    constexpr auto largest = static_cast<Wide>(~static_cast<unsigned __int128>(0) >> 1);
    return wide(negative ? -largest : largest);
  }

  Wide value_;
};

// A view of a list of integers that another object owns.
class List {
 public:
  List(const std::vector<int64_t>& values) : values_(values.data()), length_(values.size()) {}
  List(torch::headeronly::IntHeaderOnlyArrayRef values) : values_(values.data()), length_(values.size()) {}

  Int length() const { return static_cast<int64_t>(length_); }
  Int operator[](Int index) const { return values_[index.narrow()]; }
  const int64_t* begin() const { return values_; }
  const int64_t* end() const { return values_ + length_; }

  bool operator==(const List& other) const { return std::equal(begin(), end(), other.begin(), other.end()); }

  // Writes "[1, 2, 3]".
  friend std::ostream& operator<<(std::ostream& out, const List& list) {
    out << '[';
    for (size_t i = 0; i < list.length_; ++i) out << (i ? ", " : "") << list.values_[i];
    return out << ']';
  }

 private:
  const int64_t* values_;
  size_t length_;
};

// A number as Python's format "g" writes it.
struct General {
  double value;

  friend std::ostream& operator<<(std::ostream& out, General number) {
    char text[32];
    std::snprintf(text, sizeof(text), "%g", number.value);
    return out << (number.value == number.value ? text : "nan");
  }
};

inline Text dtype(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Bool: return "bool";
    case ScalarType::Byte: return "uint8";
    case ScalarType::UInt16: return "uint16";
    case ScalarType::UInt32: return "uint32";
    case ScalarType::UInt64: return "uint64";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::Float8_e5m2: return "float8_e5m2";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::ComplexHalf: return "complex32";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: return "another dtype";
  }
}

inline std::string device(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index()) : "another device";
}

inline List shape(const Tensor& tensor) { return tensor.sizes(); }
inline List strides(const Tensor& tensor) { return tensor.strides(); }
inline bool row_major(const Tensor& tensor) { return tensor.is_contiguous(); }

inline Int product(const List& sizes, Int first = 0) {
  Int product = 1;
  for (const int64_t* size = sizes.begin() + first.narrow(); size < sizes.end(); ++size) product = product * *size;
  return product;
}

inline bool floating(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  return type == ScalarType::Half || type == ScalarType::BFloat16 || type == ScalarType::Float ||
         type == ScalarType::Double;
}

inline Text wide(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Double ? "float64" : "float32"; }

// Returns whether the elements fill their memory, in any order of the dimensions.
inline bool dense(const Tensor& tensor) {
  if (tensor.numel() == 0) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) != 1) dims.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// Returns whether the elements of a tensor that is not empty lie in memory with these strides.
inline bool lies(const Tensor& tensor, const List& expected) {
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) > 1 && expected[d] != tensor.stride(d)) return false;
  }
  return true;
}

inline bool same_strides(const Tensor& tensor, const Tensor& model) {
  return model.numel() == 0 || lies(tensor, strides(model));
}

// Returns whether the elements of [N, C, H, W] fill their memory plane by plane, the columns innermost.
inline bool planes_follow(const Tensor& tensor) {
  if (tensor.numel() == 0) return true;
  const int64_t channels = tensor.size(1), height = tensor.size(2), width = tensor.size(3);
  return lies(tensor, std::vector<int64_t>{channels * height * width, height * width, width, 1});
}

// Returns whether the elements fill their memory pixel by pixel, the channels innermost.
inline bool pixels_follow(const Tensor& tensor) {
  if (tensor.numel() == 0) return true;
  const int64_t channels = tensor.size(1), height = tensor.size(2), width = tensor.size(3);
  return lies(tensor, std::vector<int64_t>{channels * height * width, 1, width * channels, channels});
}

// Returns the first point outside [lowest, size), if there is one.
inline std::optional<int64_t> first_outside(const Tensor& points, Int lowest, Int size) {
  const auto* values = static_cast<const int64_t*>(points.const_data_ptr());
  const int64_t count = points.size(0), step = points.stride(0), low = lowest.narrow(), high = size.narrow();
  for (int64_t i = 0; i < count; ++i) {
    if (const int64_t point = values[i * step]; point < low || point >= high) return point;
  }
  return std::nullopt;
}

// Returns whether all points lie in [lowest, size); on a device the kernels assert it, since reading would wait.
inline bool inside(const Tensor& points, Int lowest, Int size) {
  return !points.is_cpu() || !first_outside(points, lowest, size);
}

inline Int outlier(const Tensor& points, Int lowest, Int size) { return *first_outside(points, lowest, size); }

// Returns whether every window along a dimension of `size` elements holds at least one of them.
inline bool windows_reach(Int size, Int windows, Int kernel, Int stride, Int padding, Int dilation) {
  if (windows == 0) return true;
  if (size == 0 || (windows - 1) * stride - padding >= size || padding > (kernel - 1) * dilation) return false;
  // Taps that are no farther apart than the elements reach do not step over all of them.
  if (dilation <= size) return true;
  for (Int at = 0; at < windows && at * stride < padding; at = at + 1) {
    if (remainder(at * stride - padding, dilation) >= size) return false;
  }
  return true;
}

// Returns the first of the offsets [N, C, H', W'] that numbers no tap of its window, or a tap outside the map.
std::optional<int64_t> first_tap_outside(const Tensor& offsets, const Tensor& map, const List& kernel,
                                         const List& stride, const List& padding, const List& dilation);

inline bool taps_inside(const Tensor& offsets, const Tensor& map, const List& kernel, const List& stride,
                        const List& padding, const List& dilation) {
  return !first_tap_outside(offsets, map, kernel, stride, padding, dilation);
}

inline Int tap_outside(const Tensor& offsets, const Tensor& map, const List& kernel, const List& stride,
                       const List& padding, const List& dilation) {
  return *first_tap_outside(offsets, map, kernel, stride, padding, dilation);
}

}  // namespace checks
}  // namespace pyfast_xai
