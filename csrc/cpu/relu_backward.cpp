#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "cpu/rectifier.h"

namespace pyfast_xai {
namespace {

enum Rule { kGradient, kDeconvnet, kGuided };

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

template <class I>
PYFAST_XAI_INLINE void pass_rule(const Row<I>& row, Rule rule, I infinity) {
  const auto gradient = [](uint8_t bit, I g) __attribute__((always_inline)) { return bit ? g : I(0); };
  const auto positive = [infinity](uint8_t bit, I g) __attribute__((always_inline)) {
    return (bit != 0) & ((g > 0) | is_nan(g, infinity)) ? g : I(0);
  };
  if (rule == kGradient) return pass_row<true>(row, gradient);
  if (rule == kDeconvnet) return pass_row<false>(row, positive);
  pass_row<true>(row, positive);
}

PYFAST_XAI_CLONES void pass(const Row<int16_t>& row, Rule rule, int16_t infinity) { pass_rule(row, rule, infinity); }
PYFAST_XAI_CLONES void pass(const Row<int32_t>& row, Rule rule, int32_t infinity) { pass_rule(row, rule, infinity); }
PYFAST_XAI_CLONES void pass(const Row<int64_t>& row, Rule rule, int64_t infinity) { pass_rule(row, rule, infinity); }

template <class T>
PYFAST_XAI_INLINE void leak_values(const Row<T>& row, double slope) {
  using A = Accumulated<T>;
  const auto factor = static_cast<A>(slope);
  pass_row<true>(row, [factor](uint8_t bit, T g) __attribute__((always_inline)) {
    return bit ? g : static_cast<T>(static_cast<A>(g) * factor);
  });
}

PYFAST_XAI_CLONES void leak(const Row<Half>& row, double slope) { leak_values(row, slope); }
PYFAST_XAI_CLONES void leak(const Row<BFloat16>& row, double slope) { leak_values(row, slope); }
PYFAST_XAI_CLONES void leak(const Row<float>& row, double slope) { leak_values(row, slope); }
PYFAST_XAI_CLONES void leak(const Row<double>& row, double slope) { leak_values(row, slope); }

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
  dispatch_floating(grad, "grad", [&](auto type) {
    using T = typename decltype(type)::type;
    using I = typename Pattern<T>::Integer;
    check(grad.dim() > 0, "grad must have shape [K, ...], got ", ShapeOf{grad});
    const int64_t rows = grad.size(0);
    const auto shape = grad.sizes(), strides = grad.strides();
    using List = decltype(shape);
    int64_t size = 1;
    for (int64_t d = 1; d < grad.dim(); ++d) size *= grad.size(d);
    check(is_dense(grad) && (rows <= 1 || grad.stride(0) == size || size == 0),
          "grad must be dense with its first dimension outermost, got shape ", Listed<List>{shape}, " with strides ",
          Listed<List>{strides});
    check(rule >= 0 && rule < 3, "rule must be in [0, 3), got ", rule);
    check(negative_slope == 0 || rule == kGradient, "negative_slope must be 0 unless rule is GRADIENT, got ",
          negative_slope);
    if (rule == kDeconvnet) {
      check(!bits.has_value(), "bits must be None where rule is DECONVNET, got a tensor");
    } else {
      check(bits.has_value(), "bits must be a tensor unless rule is DECONVNET, got None");
      check_dtype(*bits, "bits", ScalarType::Byte);
      check(bits->dim() == 1 && bits->size(0) == bytes_for(size), "bits must have shape [", bytes_for(size),
            "], one bit for each of ", size, " elements, got ", ShapeOf{*bits});
    }
    check_like(out, "out", grad, "grad");

    const Tensor packed = bits ? torch::stable::contiguous(*bits) : grad;
    const auto* passes = static_cast<const uint8_t*>(packed.const_data_ptr());
    if (negative_slope != 0) {
      return pass_rows<T>(grad, passes, rows, size, out, [=](const Row<T>& row) { leak(row, negative_slope); });
    }
    pass_rows<I>(grad, passes, rows, size, out,
                 [=](const Row<I>& row) { pass(row, static_cast<Rule>(rule), Pattern<T>::kInfinity); });
  });
}

}  // namespace
}  // namespace pyfast_xai

STABLE_TORCH_LIBRARY_IMPL(pyfast_xai, CPU, m) { m.impl("relu_backward", TORCH_BOX(&pyfast_xai::relu_backward)); }
