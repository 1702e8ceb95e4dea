#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/simd.h"
#include "dispatch.h"

namespace pyfast_xai {

// Floats that are not negative are ordered as their bits are as integers, and patterns above infinity are NaN. So
// rectifiers compare integers: one kernel serves both half types, and every type fills its vectors.
template <class T>
struct Pattern {
  using Integer = std::conditional_t<sizeof(T) == 2, int16_t, std::conditional_t<sizeof(T) == 4, int32_t, int64_t>>;

  static constexpr Integer of(T value) { return std::bit_cast<Integer>(value); }
  static constexpr Integer kInfinity = of(std::numeric_limits<T>::infinity());
};

template <class I>
PYFAST_XAI_INLINE bool is_nan(I pattern, I infinity) {
  return static_cast<I>(pattern & std::numeric_limits<I>::max()) > infinity;
}

// Elements whose mask is one word of bits. Kernels handle it as 64 bytes, which compilers vectorise.
constexpr int64_t kBlock = 64;
// Blocks that make a thread worth starting: as many elements as in ATen.
constexpr int64_t kGrain = 32768 / kBlock;

inline int64_t blocks_for(int64_t count) { return (count + kBlock - 1) / kBlock; }
inline int64_t bytes_for(int64_t count) { return (count + 7) / 8; }

// Packs eight bytes that are 0 or 1 into the bits of one byte, by a multiplication.
PYFAST_XAI_INLINE void pack_mask(const uint8_t* mask, int64_t bytes, uint8_t* bits) {
  for (int64_t i = 0; i < bytes; ++i) {
    uint64_t eight;
    std::memcpy(&eight, mask + 8 * i, 8);
    bits[i] = static_cast<uint8_t>((eight * 0x0102040810204080ULL) >> 56);
  }
}

// Unpacks bits into bytes that are 0 where the bit is 0.
PYFAST_XAI_INLINE void unpack_mask(const uint8_t* bits, int64_t bytes, uint8_t* mask) {
  for (int64_t i = 0; i < bytes; ++i) {
    const uint64_t eight = (bits[i] * 0x0101010101010101ULL) & 0x8040201008040201ULL;
    std::memcpy(mask + 8 * i, &eight, 8);
  }
}

}  // namespace pyfast_xai
