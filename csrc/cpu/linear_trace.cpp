#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "checks.h"
#include "cpu/bitmap.h"
#include "cpu/signs.h"
#include "cpu/simd.h"

namespace pyfast_xai {
namespace {

constexpr int64_t kBlock = 32;  // words of a bit row handled at once: 4096 neurons of them fit a second-level cache
constexpr int64_t kSweep = 16;  // neurons between two checks whether every wanted bit is set

// ORs the rows `neurons` of a bit matrix into `found`, and stops when all of `wanted` are set. With random signs the
// first twenty neurons usually suffice, of however many thousand.
template <class Machine>
PYFAST_XAI_INLINE void unite_block_on(const uint64_t* matrix, int64_t stride, const int64_t* neurons, int64_t count,
                                      const uint64_t* wanted, uint64_t* found) {
  using Words = Vector<uint64_t, Machine>;
  using Lanes = typename Words::type;
  constexpr int64_t kVectors = kBlock / Words::kLanes;
  Lanes united[kVectors] = {};
  for (int64_t at = 0; at < count; at += kSweep) {
    const int64_t end = std::min(at + kSweep, count);
    for (int64_t i = at; i < end; ++i) {
      const uint64_t* row = matrix + neurons[i] * stride;
      for (int64_t v = 0; v < kVectors; ++v) united[v] |= lanes<Machine>(row + v * Words::kLanes)->all;
    }
    Lanes missing = {};
    for (int64_t v = 0; v < kVectors; ++v) missing |= lanes<Machine>(wanted + v * Words::kLanes)->all & ~united[v];
    uint64_t any = 0;
    for (int64_t w = 0; w < Words::kLanes; ++w) any |= missing[w];
    if (!any) break;
  }
  for (int64_t v = 0; v < kVectors; ++v) {
    lanes<Machine>(found + v * Words::kLanes)->all |= united[v] & lanes<Machine>(wanted + v * Words::kLanes)->all;
  }
}
PYFAST_XAI_ON_EACH_MACHINE(void, unite_block,
                           (const uint64_t* matrix, int64_t stride, const int64_t* neurons, int64_t count,
                            const uint64_t* wanted, uint64_t* found),
                           (matrix, stride, neurons, count, wanted, found))

// The same for the block at the end of a row.
void unite_rest(const uint64_t* matrix, int64_t stride, const int64_t* neurons, int64_t count, const uint64_t* wanted,
                uint64_t* found, int64_t words) {
  uint64_t united[kBlock] = {};
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t* row = matrix + neurons[i] * stride;
    uint64_t missing = 0;
    for (int64_t w = 0; w < words; ++w) {
      united[w] |= row[w];
      missing |= wanted[w] & ~united[w];
    }
    if (!missing) break;
  }
  for (int64_t w = 0; w < words; ++w) found[w] |= united[w] & wanted[w];
}

// Neurons of each row, those of ordinary points before those of negative ones: slot 2 * row + negative. A point of -1
// is none.
struct Selection {
  std::vector<int64_t> first, neurons;

  Selection(const int64_t* points, const bool* negative, int64_t count, int64_t rows, int64_t outputs)
      : first(2 * rows + 1, 0), neurons(count) {
    const auto slot = [&](int64_t i) { return 2 * (points[i] / outputs) + (negative && negative[i]); };
    for (int64_t i = 0; i < count; ++i) {
      if (points[i] >= 0) ++first[slot(i) + 1];
    }
    for (size_t s = 1; s < first.size(); ++s) first[s] += first[s - 1];
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    for (int64_t i = 0; i < count; ++i) {
      if (points[i] >= 0) neurons[next[slot(i)]++] = points[i] % outputs;
    }
  }
};

struct Layer {
  const uint64_t* positive;  // weight > 0, [outputs, words]
  const uint64_t* negative;  // weight < 0
  int64_t words;
};

bool any_bit(const uint64_t* bits, int64_t words) {
  return std::any_of(bits, bits + words, [](uint64_t word) { return word != 0; });
}

// One block of words of one row. `wanted` are the inputs of one sign, `agreeing` the weights that excite with it and
// `opposing` those that inhibit; a matrix of which no bit is wanted is never read.
void trace_block(const Selection& selection, int64_t row, const uint64_t* agreeing, const uint64_t* opposing,
                 int64_t stride, const uint64_t* wanted, uint64_t* found, int64_t words) {
  if (!any_bit(wanted, words)) return;
  for (int flip = 0; flip < 2; ++flip) {
    const int64_t begin = selection.first[2 * row + flip], count = selection.first[2 * row + flip + 1] - begin;
    if (!count) continue;
    const uint64_t* matrix = flip ? opposing : agreeing;
    const int64_t* neurons = selection.neurons.data() + begin;
    if (words == kBlock) {
      unite_block(matrix, stride, neurons, count, wanted, found);
    } else {
      unite_rest(matrix, stride, neurons, count, wanted, found, words);
    }
  }
}

Tensor linear_trace(const Tensor& input, const Tensor& weight_positive, const Tensor& weight_negative,
                    const Tensor& points, std::optional<Tensor> negative, std::optional<int64_t> capacity) {
  checks::linear_trace(input, weight_positive, weight_negative, points, negative, capacity);
  const int64_t rows = input.size(0), columns = input.size(1), outputs = weight_positive.size(0);
  const int64_t words = words_for(columns);

  const Tensor list = torch::stable::contiguous(points);
  const Tensor flips = negative ? torch::stable::contiguous(*negative) : list;
  const auto* flat = static_cast<const int64_t*>(list.const_data_ptr());
  const Selection selection(flat, negative ? static_cast<const bool*>(flips.const_data_ptr()) : nullptr, list.numel(),
                            rows, outputs);

  const Tensor positive_rows = torch::stable::contiguous(weight_positive);
  const Tensor negative_rows = torch::stable::contiguous(weight_negative);
  const Layer layer{static_cast<const uint64_t*>(positive_rows.const_data_ptr()),
                    static_cast<const uint64_t*>(negative_rows.const_data_ptr()), words};
  std::vector<uint64_t> above(rows * words), below(rows * words), found(rows * words, 0);
  sign_matrix(torch::stable::contiguous(input), above.data(), below.data());

  // Rows within a block come next to each other, so a block of the weight bits stays in cache for all of them.
  const int64_t blocks = (words + kBlock - 1) / kBlock;
  torch::stable::parallel_for(0, blocks * rows, 8, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t word = task / rows * kBlock, row = task % rows;
      const int64_t size = std::min(kBlock, words - word), at = row * words + word;
      const uint64_t* agreeing = layer.positive + word;
      const uint64_t* opposing = layer.negative + word;
      trace_block(selection, row, agreeing, opposing, words, above.data() + at, found.data() + at, size);
      trace_block(selection, row, opposing, agreeing, words, below.data() + at, found.data() + at, size);
    }
  });
  return set_positions(found.data(), rows, words, columns, capacity);
}

}  // namespace
}  // namespace pyfast_xai

STABLE_TORCH_LIBRARY_IMPL(pyfast_xai, CPU, m) { m.impl("linear_trace", TORCH_BOX(&pyfast_xai::linear_trace)); }
