#include "cpu/bitmap.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <bit>
#include <vector>

#include "checks.h"
#include "cpu/simd.h"
#include "pyfast_xai/bits.h"

namespace pyfast_xai {
namespace {

constexpr int64_t kChunk = 4096;  // words

template <class Machine>
PYFAST_XAI_INLINE int64_t count_bits_on(const uint64_t* bits, int64_t words) {
  int64_t count = 0;
  for (int64_t i = 0; i < words; ++i) count += std::popcount(bits[i]);
  return count;
}
PYFAST_XAI_ON_EACH_MACHINE(int64_t, count_bits, (const uint64_t* bits, int64_t words), (bits, words))

void write_positions(const uint64_t* bits, int64_t begin, int64_t end, int64_t words, int64_t columns, int64_t* out) {
  int64_t row = begin / words, word = begin % words;
  for (int64_t i = begin; i < end; ++i) {
    out = write_places(bits[i], row * columns + word * kWordBits, out);
    if (++word == words) {
      word = 0;
      ++row;
    }
  }
}

}  // namespace

torch::stable::Tensor list_of(int64_t found, std::optional<int64_t> capacity) {
  if (capacity) checks::capacity_suffices(*capacity, found);
  auto out = torch::stable::empty({capacity.value_or(found)}, torch::headeronly::ScalarType::Long);
  std::fill(static_cast<int64_t*>(out.mutable_data_ptr()) + found,
            static_cast<int64_t*>(out.mutable_data_ptr()) + capacity.value_or(found), -1);
  return out;
}

torch::stable::Tensor set_positions(const uint64_t* bits, int64_t rows, int64_t words, int64_t columns,
                                    std::optional<int64_t> capacity) {
  const int64_t total = rows * words;
  const int64_t chunks = (total + kChunk - 1) / kChunk;
  std::vector<int64_t> first(chunks + 1, 0);
  torch::stable::parallel_for(0, chunks, 16, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      first[c + 1] = count_bits(bits + c * kChunk, std::min(kChunk, total - c * kChunk));
    }
  });
  for (int64_t c = 0; c < chunks; ++c) first[c + 1] += first[c];

  auto out = list_of(first[chunks], capacity);
  auto* positions = static_cast<int64_t*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, chunks, 16, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      write_positions(bits, c * kChunk, std::min((c + 1) * kChunk, total), words, columns, positions + first[c]);
    }
  });
  return out;
}

}  // namespace pyfast_xai
