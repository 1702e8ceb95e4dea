#pragma once

#include <cmath>
#include <cstdint>

#include "pyfast_xai/portable.h"

// The order of torch.argmax, for any order of comparison: a NaN beats every number, the first of equals wins.
namespace pyfast_xai {

template <class T>
PYFAST_XAI_HD inline bool beats(T candidate, T best) {
  return candidate > best || (candidate != candidate && best == best);
}

template <class T>
struct Ranked {
  T value;
  int64_t index;
};

// A candidate that loses against every other, even one of the same value.
template <class T>
PYFAST_XAI_HD inline Ranked<T> lowest_rank() {
  return {static_cast<T>(-INFINITY), INT64_MAX};
}

template <class T>
PYFAST_XAI_HD inline Ranked<T> stronger(Ranked<T> a, Ranked<T> b) {
  if (beats(a.value, b.value)) return a;
  if (beats(b.value, a.value)) return b;
  return a.index < b.index ? a : b;
}

}  // namespace pyfast_xai
