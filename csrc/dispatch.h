#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

#include "arguments.h"

namespace pyfast_xai {

using Half = c10::Half;
using BFloat16 = c10::BFloat16;

template <class T>
inline constexpr bool is_half = std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>;

// Half types accumulate in float, the others in themselves.
template <class T>
using Accumulated = std::conditional_t<is_half<T>, float, T>;

// Calls `body(std::type_identity<T>{})` with the element type of `tensor`: the one switch over dtypes.
template <class Body>
decltype(auto) dispatch_floating(const Tensor& tensor, Body&& body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return body(std::type_identity<float>{});
    case ScalarType::Double: return body(std::type_identity<double>{});
    case ScalarType::Half: return body(std::type_identity<Half>{});
    case ScalarType::BFloat16: return body(std::type_identity<BFloat16>{});
    default: fail("a dtype that a check lets pass must have kernels, got ", checks::dtype(tensor));
  }
}

}  // namespace pyfast_xai
