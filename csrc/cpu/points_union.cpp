#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <iterator>
#include <optional>
#include <vector>

#include "checks.h"
#include "cpu/bitmap.h"
#include "pyfast_xai/bits.h"

namespace pyfast_xai {
namespace {

// Above this many places a point, clearing and scanning the bitmap costs more than sorting the points.
constexpr int64_t kSparse = 4096;

Tensor union_by_sort(const int64_t* points, int64_t count, std::optional<int64_t> capacity) {
  std::vector<int64_t> sorted;
  std::copy_if(points, points + count, std::back_inserter(sorted), [](int64_t point) { return point >= 0; });
  std::sort(sorted.begin(), sorted.end());
  sorted.erase(std::unique(sorted.begin(), sorted.end()), sorted.end());
  Tensor out = list_of(static_cast<int64_t>(sorted.size()), capacity);
  std::copy(sorted.begin(), sorted.end(), static_cast<int64_t*>(out.mutable_data_ptr()));
  return out;
}

Tensor union_by_bitmap(const int64_t* points, int64_t count, int64_t size, std::optional<int64_t> capacity) {
  std::vector<uint64_t> bits(words_for(size), 0);
  for (int64_t i = 0; i < count; ++i) {
    if (points[i] >= 0) bits[points[i] / kWordBits] |= bit_of(points[i]);
  }
  return set_positions(bits.data(), 1, static_cast<int64_t>(bits.size()), size, capacity);
}

Tensor points_union(const Tensor& points, int64_t size, std::optional<int64_t> capacity) {
  checks::points_union(points, size, capacity);
  const Tensor list = torch::stable::contiguous(points);
  const int64_t count = list.numel();
  const auto* values = static_cast<const int64_t*>(list.const_data_ptr());
  return size / kSparse > count ? union_by_sort(values, count, capacity)
                                : union_by_bitmap(values, count, size, capacity);
}

}  // namespace
}  // namespace pyfast_xai

STABLE_TORCH_LIBRARY_IMPL(pyfast_xai, CPU, m) { m.impl("points_union", TORCH_BOX(&pyfast_xai::points_union)); }
