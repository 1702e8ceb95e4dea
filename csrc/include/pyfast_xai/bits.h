#pragma once

#include <cstdint>

#ifndef __CUDA_ARCH__
#include <bit>
#endif

#include "pyfast_xai/portable.h"

// Sets of places as rows of 64-bit words, the lowest bit first.
namespace pyfast_xai {

inline constexpr int64_t kWordBits = 64;

PYFAST_XAI_HD inline int64_t words_for(int64_t bits) { return (bits + kWordBits - 1) / kWordBits; }

PYFAST_XAI_HD inline uint64_t bit_of(int64_t place) { return uint64_t{1} << (place % kWordBits); }

PYFAST_XAI_HD inline int lowest_bit(uint64_t word) {
#ifdef __CUDA_ARCH__
  return __ffsll(static_cast<long long>(word)) - 1;
#else
  return std::countr_zero(word);
#endif
}

// Writes the places of the set bits of a word whose lowest bit is place `first`.
PYFAST_XAI_HD inline int64_t* write_places(uint64_t word, int64_t first, int64_t* out) {
  for (; word; word &= word - 1) *out++ = first + lowest_bit(word);
  return out;
}

}  // namespace pyfast_xai
