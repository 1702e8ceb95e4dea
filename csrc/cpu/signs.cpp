#include "cpu/signs.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#include "cpu/simd.h"

namespace pyfast_xai {
namespace {

// Gathers 64 bytes that are 0 or 1 into the bits of a word, eight at a time by one multiplication.
PYFAST_XAI_INLINE uint64_t pack_bytes(const uint8_t* bytes) {
  uint64_t word = 0;
  for (int i = 0; i < 8; ++i) {
    uint64_t eight;
    std::memcpy(&eight, bytes + 8 * i, 8);
    word |= (eight * 0x0102040810204080ULL) >> 56 << (8 * i);
  }
  return word;
}

template <class T, class IsPositive, class IsNegative>
PYFAST_XAI_INLINE void pack_signs(const T* values, int64_t count, uint64_t* positive, uint64_t* negative,
                                  IsPositive is_positive, IsNegative is_negative) {
  for (int64_t at = 0; at < count; at += kWordBits, values += kWordBits) {
    alignas(64) uint8_t above[kWordBits] = {};
    alignas(64) uint8_t below[kWordBits] = {};
    if (count - at >= kWordBits) {
      for (int64_t j = 0; j < kWordBits; ++j) above[j] = is_positive(values[j]);
      for (int64_t j = 0; j < kWordBits; ++j) below[j] = is_negative(values[j]);
    } else {
      for (int64_t j = 0; j < count - at; ++j) above[j] = is_positive(values[j]);
      for (int64_t j = 0; j < count - at; ++j) below[j] = is_negative(values[j]);
    }
    *positive++ = pack_bytes(above);
    *negative++ = pack_bytes(below);
  }
}

template <class Machine, class T>
PYFAST_XAI_INLINE void float_signs_on(const T* values, int64_t count, uint64_t* positive, uint64_t* negative) {
  pack_signs(
      values, count, positive, negative, [](T x) -> uint8_t { return x > 0; }, [](T x) -> uint8_t { return x < 0; });
}

// Signs straight from the bits of a half: between zero (excluded) and `infinity`, with or without the sign bit.
template <class Machine>
PYFAST_XAI_INLINE void half_signs_on(const uint16_t* bits, int64_t count, uint64_t* positive, uint64_t* negative,
                                     uint16_t infinity) {
  pack_signs(
      bits, count, positive, negative,
      [infinity](uint16_t x) -> uint8_t { return static_cast<uint16_t>(x - 1) < infinity; },
      [infinity](uint16_t x) -> uint8_t { return static_cast<uint16_t>(x - 0x8001) < infinity; });
}

PYFAST_XAI_ON_EACH_MACHINE(void, float_signs,
                           (const float* values, int64_t count, uint64_t* positive, uint64_t* negative),
                           (values, count, positive, negative))
PYFAST_XAI_ON_EACH_MACHINE(void, float_signs,
                           (const double* values, int64_t count, uint64_t* positive, uint64_t* negative),
                           (values, count, positive, negative))
PYFAST_XAI_ON_EACH_MACHINE(void, half_signs,
                           (const uint16_t* bits, int64_t count, uint64_t* positive, uint64_t* negative,
                            uint16_t infinity),
                           (bits, count, positive, negative, infinity))

}  // namespace

void sign_words(const float* values, int64_t count, uint64_t* positive, uint64_t* negative) {
  float_signs(values, count, positive, negative);
}

void sign_words(const double* values, int64_t count, uint64_t* positive, uint64_t* negative) {
  float_signs(values, count, positive, negative);
}

void sign_words(const Half* values, int64_t count, uint64_t* positive, uint64_t* negative) {
  half_signs(reinterpret_cast<const uint16_t*>(values), count, positive, negative, 0x7C00);
}

void sign_words(const BFloat16* values, int64_t count, uint64_t* positive, uint64_t* negative) {
  half_signs(reinterpret_cast<const uint16_t*>(values), count, positive, negative, 0x7F80);
}

void sign_matrix(const Tensor& matrix, uint64_t* positive, uint64_t* negative) {
  const int64_t rows = matrix.size(0), columns = matrix.size(1), words = words_for(columns);
  dispatch_floating(matrix, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* values = static_cast<const T*>(matrix.const_data_ptr());
    const int64_t grain = std::max<int64_t>(1, (1 << 18) / std::max<int64_t>(1, columns));
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        sign_words(values + r * columns, columns, positive + r * words, negative + r * words);
      }
    });
  });
}

}  // namespace pyfast_xai
