#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>

#include "cuda/bitmap.h"
#include "pyfast_xai/bits.h"

namespace pyfast_xai {
namespace {

constexpr int kThreads = 256;

// A bitmap of more than so many places a point costs more memory than torch's sort, unless it is small anyway.
constexpr int64_t kSparse = 1 << 16;
constexpr int64_t kSmall = int64_t{1} << 26;  // 8 MiB

// Sets the bits of the points; with no bitmap only checks them.
__global__ void __launch_bounds__(kThreads)
mark_kernel(const int64_t* points, int64_t count, int64_t size, uint64_t* bits, PointNote* note) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += step) {
    if (!is_inside(points, i, size, note) || !bits) continue;
    atomicOr(reinterpret_cast<unsigned long long*>(bits + points[i] / kWordBits), bit_of(points[i]));
  }
}

Tensor sorted_unique(const Tensor& points) {
  // aten::_unique2(Tensor self, bool sorted, bool return_inverse, bool return_counts) -> (Tensor, Tensor, Tensor)
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> stack{from(points), from(true), from(false), from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::_unique2", "", stack.data(), TORCH_ABI_VERSION));
  to<Tensor>(stack[1]);  // owned, so taken, and dropped
  to<Tensor>(stack[2]);
  return to<Tensor>(stack[0]);
}

Tensor points_union(const Tensor& points, int64_t size) {
  check_points(points);
  check(size >= 0, "size must not be negative, got ", size);
  const int64_t count = points.numel();
  if (count == 0) return torch::stable::new_empty(points, {0}, ScalarType::Long);
  const DeviceScope scope(points);
  const Tensor list = torch::stable::contiguous(points);
  const auto* values = static_cast<const int64_t*>(list.const_data_ptr());
  const OutcomeOnDevice outcome(list, scope.stream());
  const bool sparse = size > kSmall && size / kSparse > count;
  const int64_t words = sparse ? 0 : words_for(size);
  const Tensor memory = cleared_words(list, words, scope.stream());
  auto* bits = sparse ? nullptr : static_cast<uint64_t*>(memory.mutable_data_ptr());
  mark_kernel<<<blocks_for(count, kThreads), kThreads, 0, scope.stream()>>>(values, count, size, bits, outcome.note());
  check_launch("mark_kernel");
  if (!sparse) return set_positions(bits, 1, words, size, outcome, list, size, scope.stream());
  outcome.wait(values, size);
  return sorted_unique(list);
}

}  // namespace
}  // namespace pyfast_xai

STABLE_TORCH_LIBRARY_IMPL(pyfast_xai, CUDA, m) { m.impl("points_union", TORCH_BOX(&pyfast_xai::points_union)); }
