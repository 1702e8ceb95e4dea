#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "checks.h"
#include "cpu/rectifier.h"

namespace pyfast_xai {
namespace {

template <class I>
struct Range {
  I infinity, upper;
};

template <bool kBounded, bool kClamped, class I>
PYFAST_XAI_INLINE void rectify_block(const I* input, const I* bound, int64_t count, Range<I> range, I* out,
                                     uint8_t* mask) {
  using Unsigned = std::make_unsigned_t<I>;
  const auto [infinity, upper] = range;
  // 0 < x <= largest in one comparison: as an unsigned number, -1 and all negative ones are larger.
  const I largest = upper == infinity ? infinity : upper == 0 ? I(0) : static_cast<I>(upper - 1);
  for (int64_t j = 0; j < count; ++j) {
    const I x = input[j];
    const bool nan = is_nan(x, infinity);
    bool passes = static_cast<Unsigned>(static_cast<Unsigned>(x) - 1) < static_cast<Unsigned>(largest);
    I y = x > 0 ? x : I(0);
    y = y > upper ? upper : y;
    y = nan ? x : y;
    if constexpr (kBounded) {
      // No number is inside limits of NaN, and zero has two bit patterns.
      const I b = bound[j];
      const I most = b > infinity ? I(-1) : b == std::numeric_limits<I>::min() ? I(0) : b;
      passes &= y <= most;
      if constexpr (kClamped) {
        y = y <= most ? y : b;
        y = nan ? x : y;
      }
    }
    mask[j] = passes;
    out[j] = y;
  }
}

template <bool kBounded, bool kClamped, class I>
PYFAST_XAI_INLINE void rectify_blocks(const I* input, const I* bound, int64_t count, Range<I> range, I* out,
                                      uint8_t* bits) {
  alignas(kBlock) uint8_t mask[kBlock];
  for (int64_t block = 0; block < count / kBlock; ++block) {
    rectify_block<kBounded, kClamped>(input, bound, kBlock, range, out, mask);
    pack_mask(mask, kBlock / 8, bits);
    input += kBlock;
    if constexpr (kBounded) bound += kBlock;
    out += kBlock;
    bits += kBlock / 8;
  }
  const int64_t rest = count % kBlock;
  std::memset(mask, 0, kBlock);
  rectify_block<kBounded, kClamped>(input, bound, rest, range, out, mask);
  pack_mask(mask, bytes_for(rest), bits);
}

template <class Machine, class I>
PYFAST_XAI_INLINE void rectify_on(const I* input, const I* bound, bool clamp, int64_t count, Range<I> range, I* out,
                                  uint8_t* bits) {
  if (bound == nullptr) return rectify_blocks<false, false>(input, bound, count, range, out, bits);
  if (!clamp) return rectify_blocks<true, false>(input, bound, count, range, out, bits);
  rectify_blocks<true, true>(input, bound, count, range, out, bits);
}

PYFAST_XAI_ON_EACH_MACHINE(void, rectify,
                           (const int16_t* input, const int16_t* bound, bool clamp, int64_t count, Range<int16_t> range,
                            int16_t* out, uint8_t* bits),
                           (input, bound, clamp, count, range, out, bits))
PYFAST_XAI_ON_EACH_MACHINE(void, rectify,
                           (const int32_t* input, const int32_t* bound, bool clamp, int64_t count, Range<int32_t> range,
                            int32_t* out, uint8_t* bits),
                           (input, bound, clamp, count, range, out, bits))
PYFAST_XAI_ON_EACH_MACHINE(void, rectify,
                           (const int64_t* input, const int64_t* bound, bool clamp, int64_t count, Range<int64_t> range,
                            int64_t* out, uint8_t* bits),
                           (input, bound, clamp, count, range, out, bits))

Tensor relu_forward(const Tensor& input, double upper, std::optional<Tensor> bound, bool clamp, const Tensor& out) {
  checks::relu_forward(input, upper, bound, clamp, out);
  return dispatch_floating(input, [&](auto type) {
    using T = typename decltype(type)::type;
    using I = typename Pattern<T>::Integer;
    const int64_t count = input.numel();
    Tensor bits = torch::stable::empty({bytes_for(count)}, ScalarType::Byte);
    const auto* from = static_cast<const I*>(input.const_data_ptr());
    const auto* most = bound ? static_cast<const I*>(bound->const_data_ptr()) : nullptr;
    auto* to = static_cast<I*>(out.mutable_data_ptr());
    auto* packed = static_cast<uint8_t*>(bits.mutable_data_ptr());
    const Range<I> range{Pattern<T>::kInfinity, Pattern<T>::of(static_cast<T>(upper))};
    torch::stable::parallel_for(0, blocks_for(count), kGrain, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kBlock, size = std::min(end * kBlock, count) - first;
      rectify(from + first, most ? most + first : nullptr, clamp, size, range, to + first, packed + bytes_for(first));
    });
    return bits;
  });
}

}  // namespace
}  // namespace pyfast_xai

STABLE_TORCH_LIBRARY_IMPL(pyfast_xai, CPU, m) { m.impl("relu_forward", TORCH_BOX(&pyfast_xai::relu_forward)); }
