#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "checks.h"
#include "cpu/rectifier.h"

namespace pyfast_xai {
namespace {

// One row of gradients, or a part of it that starts at a whole block.
template <class E>
struct Row {
  const E* grad;
  const uint8_t* bits;
  int64_t count;
  E* out;
};

// out[j] = pass(mask[j], grad[j]), a block at a time.
template <bool kMasked, class E, class Pass>
PYFAST_XAI_INLINE void pass_row(const Row<E>& row, Pass pass) {
  alignas(kBlock) uint8_t mask[kBlock];
  const auto pass_block = [&](int64_t at, int64_t size) __attribute__((always_inline)) {
    if constexpr (kMasked) unpack_mask(row.bits + at / 8, bytes_for(size), mask);
    for (int64_t j = 0; j < size; ++j) row.out[at + j] = pass(kMasked ? mask[j] : uint8_t(1), row.grad[at + j]);
  };
  int64_t at = 0;
  for (; at + kBlock <= row.count; at += kBlock) pass_block(at, kBlock);
  pass_block(at, row.count % kBlock);
}

template <class Machine, class I>
PYFAST_XAI_INLINE void pass_on(const Row<I>& row, Rectify rule, I infinity) {
  const auto gradient = [](uint8_t bit, I g) __attribute__((always_inline)) { return bit ? g : I(0); };
  const auto positive = [infinity](uint8_t bit, I g) __attribute__((always_inline)) {
    return (bit != 0) & ((g > 0) | is_nan(g, infinity)) ? g : I(0);
  };
  if (rule == Rectify::GRADIENT) return pass_row<true>(row, gradient);
  if (rule == Rectify::DECONVNET) return pass_row<false>(row, positive);
  pass_row<true>(row, positive);
}

PYFAST_XAI_ON_EACH_MACHINE(void, pass, (const Row<int16_t>& row, Rectify rule, int16_t infinity), (row, rule, infinity))
PYFAST_XAI_ON_EACH_MACHINE(void, pass, (const Row<int32_t>& row, Rectify rule, int32_t infinity), (row, rule, infinity))
PYFAST_XAI_ON_EACH_MACHINE(void, pass, (const Row<int64_t>& row, Rectify rule, int64_t infinity), (row, rule, infinity))

template <class Machine, class T>
PYFAST_XAI_INLINE void leak_on(const Row<T>& row, double slope) {
  using A = Accumulated<T>;
  const auto factor = static_cast<A>(slope);
  pass_row<true>(row, [factor](uint8_t bit, T g) __attribute__((always_inline)) {
    return bit ? g : static_cast<T>(static_cast<A>(g) * factor);
  });
}

PYFAST_XAI_ON_EACH_MACHINE(void, leak, (const Row<Half>& row, double slope), (row, slope))
PYFAST_XAI_ON_EACH_MACHINE(void, leak, (const Row<BFloat16>& row, double slope), (row, slope))
PYFAST_XAI_ON_EACH_MACHINE(void, leak, (const Row<float>& row, double slope), (row, slope))
PYFAST_XAI_ON_EACH_MACHINE(void, leak, (const Row<double>& row, double slope), (row, slope))

// Calls `pass` with the parts of `rows` rows of `size` elements; the bits of every row are the same.
template <class E, class PassPart>
void pass_rows(const Tensor& grad, const uint8_t* bits, int64_t rows, int64_t size, const Tensor& out, PassPart pass) {
  const auto* from = static_cast<const E*>(grad.const_data_ptr());
  auto* to = static_cast<E*>(out.mutable_data_ptr());
  const int64_t blocks = blocks_for(size);
  torch::stable::parallel_for(0, rows * blocks, kGrain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = begin / blocks, block = begin % blocks, last = std::min(blocks, block + end - begin);
      const int64_t first = block * kBlock, at = row * size + first;
      pass(Row<E>{from + at, bits + bytes_for(first), std::min(last * kBlock, size) - first, to + at});
      begin += last - block;
    }
  });
}

void relu_backward(const Tensor& grad, std::optional<Tensor> bits, int64_t rule, double negative_slope,
                   const Tensor& out) {
  checks::relu_backward(grad, bits, rule, negative_slope, out);
  dispatch_floating(grad, [&](auto type) {
    using T = typename decltype(type)::type;
    using I = typename Pattern<T>::Integer;
    const int64_t rows = grad.size(0), size = rows ? grad.numel() / rows : 0;
    const Tensor packed = bits ? torch::stable::contiguous(*bits) : grad;
    const auto* passes = static_cast<const uint8_t*>(packed.const_data_ptr());
    if (negative_slope != 0) {
      return pass_rows<T>(grad, passes, rows, size, out, [=](const Row<T>& row) { leak(row, negative_slope); });
    }
    pass_rows<I>(grad, passes, rows, size, out,
                 [=](const Row<I>& row) { pass(row, static_cast<Rectify>(rule), Pattern<T>::kInfinity); });
  });
}

}  // namespace
}  // namespace pyfast_xai

STABLE_TORCH_LIBRARY_IMPL(pyfast_xai, CPU, m) { m.impl("relu_backward", TORCH_BOX(&pyfast_xai::relu_backward)); }
