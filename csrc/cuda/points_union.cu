#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <optional>

#include "checks.h"
#include "cuda/bitmap.h"
#include "cuda/point_check.h"
#include "pyfast_xai/bits.h"

namespace pyfast_xai {
namespace {

constexpr int kThreads = 256;

// A bitmap of more than so many places a point costs more memory than torch's sort, unless it is small anyway.
constexpr int64_t kSparse = 1 << 16;
constexpr int64_t kSmall = int64_t{1} << 26;  // 8 MiB

// Sets the bits of the points.
__global__ void __launch_bounds__(kThreads)
    mark_kernel(const int64_t* points, int64_t count, int64_t size, uint64_t* bits) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += step) {
    if (!is_point(points[i], size)) continue;
    atomicOr(reinterpret_cast<unsigned long long*>(bits + points[i] / kWordBits), bit_of(points[i]));
  }
}

// Sets the bits of the entries of a sorted list that are not the entry before them.
__global__ void __launch_bounds__(kThreads)
    mark_first_kernel(const int64_t* sorted, int64_t count, int64_t size, uint64_t* bits) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += step) {
    if (!is_point(sorted[i], size) || (i > 0 && sorted[i] == sorted[i - 1])) continue;
    atomicOr(reinterpret_cast<unsigned long long*>(bits + i / kWordBits), bit_of(i));
  }
}

// Replaces each index into a list by the entry at that index; -1 stays -1.
__global__ void __launch_bounds__(kThreads) look_up_kernel(const int64_t* list, int64_t count, int64_t* places) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += step) {
    if (places[i] >= 0) places[i] = list[places[i]];
  }
}

Tensor sorted_values(const Tensor& points) {
  // aten::sort(Tensor self, int dim, bool descending) -> (Tensor values, Tensor indices)
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 3> stack{from(points), from(int64_t{0}), from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "", stack.data(), TORCH_ABI_VERSION));
  to<Tensor>(stack[1]);  // takes ownership of the indices and frees them
  return to<Tensor>(stack[0]);
}

Tensor union_by_sort(const Tensor& points, int64_t size, std::optional<int64_t> capacity, cudaStream_t stream) {
  const int64_t count = points.numel(), words = words_for(count);
  const Tensor sorted = sorted_values(points);
  const auto* values = static_cast<const int64_t*>(sorted.const_data_ptr());
  const Tensor memory = cleared_words(points, words, stream);
  auto* bits = static_cast<uint64_t*>(memory.mutable_data_ptr());
  if (count > 0) {
    mark_first_kernel<<<blocks_for(count, kThreads), kThreads, 0, stream>>>(values, count, size, bits);
    check_launch("mark_first_kernel");
  }
  Tensor out = set_positions(bits, 1, words, count, count, capacity, points, stream);
  if (out.numel() > 0) {
    look_up_kernel<<<blocks_for(out.numel(), kThreads), kThreads, 0, stream>>>(
        values, out.numel(), static_cast<int64_t*>(out.mutable_data_ptr()));
    check_launch("look_up_kernel");
  }
  return out;
}

Tensor union_by_bitmap(const Tensor& points, int64_t size, std::optional<int64_t> capacity, cudaStream_t stream) {
  const int64_t count = points.numel(), words = words_for(size);
  const Tensor memory = cleared_words(points, words, stream);
  auto* bits = static_cast<uint64_t*>(memory.mutable_data_ptr());
  if (count > 0) {
    mark_kernel<<<blocks_for(count, kThreads), kThreads, 0, stream>>>(
        static_cast<const int64_t*>(points.const_data_ptr()), count, size, bits);
    check_launch("mark_kernel");
  }
  return set_positions(bits, 1, words, size, std::min(count, size), capacity, points, stream);
}

Tensor points_union(const Tensor& points, int64_t size, std::optional<int64_t> capacity) {
  checks::points_union(points, size, capacity);
  const DeviceScope scope(points);
  const Tensor list = torch::stable::contiguous(points);
  return size > kSmall && size / kSparse > list.numel() ? union_by_sort(list, size, capacity, scope.stream())
                                                        : union_by_bitmap(list, size, capacity, scope.stream());
}

}  // namespace
}  // namespace pyfast_xai

STABLE_TORCH_LIBRARY_IMPL(pyfast_xai_cuda, CUDA, m) { m.impl("points_union", TORCH_BOX(&pyfast_xai::points_union)); }
