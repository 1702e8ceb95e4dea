#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <vector>

#include "cpu/max_pool.h"
#include "cpu/simd.h"

namespace pyfast_xai::checks {
namespace {

template <class Machine>
PYFAST_XAI_INLINE uint8_t largest_byte_on(const uint8_t* bytes, int64_t count) {
  uint8_t largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, bytes[i]);
  return largest;
}
PYFAST_XAI_ON_EACH_MACHINE(uint8_t, largest_byte, (const uint8_t* bytes, int64_t count), (bytes, count))

// The taps of a window that lie inside, in one word: the first row and column, and how many follow each of them.
struct Inside {
  uint32_t word;

  Inside(const Taps& rows, const Taps& columns)
      : word(static_cast<uint32_t>(rows.begin | columns.begin << 8 | (rows.end - rows.begin - 1) << 16 |
                                   (columns.end - columns.begin - 1) << 24)) {}
};

// The width of a window, and the factor that replaces the division of a tap by it.
struct Width {
  uint32_t columns, reciprocal;

  explicit Width(const Pool& pool)
      : columns(static_cast<uint32_t>(pool.kernel[1])), reciprocal((65536 + columns - 1) / columns) {}
};

// Returns 1 for a tap outside the map, else 0, without a branch, so that the loop over taps vectorises.
PYFAST_XAI_INLINE uint32_t lies_outside(uint8_t tap, const Width& width, uint32_t inside) {
  const uint32_t row = (tap * width.reciprocal) >> 16, column = tap - row * width.columns;
  // As unsigned numbers, negative differences are larger than all others.
  return uint32_t{row - (inside & 255) > (inside >> 16 & 255)} | uint32_t{column - (inside >> 8 & 255) > inside >> 24};
}

// Returns whether `count` taps lie inside, all of one window or each of a window of its own.
template <class Machine>
PYFAST_XAI_INLINE bool all_of_window_on(const uint8_t* taps, int64_t count, const Width& width, Inside inside) {
  const Width w = width;
  uint32_t outside = 0;
  for (int64_t i = 0; i < count; ++i) outside |= lies_outside(taps[i], w, inside.word);
  return outside == 0;
}
PYFAST_XAI_ON_EACH_MACHINE(bool, all_of_window, (const uint8_t* taps, int64_t count, const Width& width, Inside inside),
                           (taps, count, width, inside))

template <class Machine>
PYFAST_XAI_INLINE bool all_of_windows_on(const uint8_t* taps, int64_t count, const Width& width, const Inside* inside) {
  const Width w = width;
  uint32_t outside = 0;
  for (int64_t i = 0; i < count; ++i) outside |= lies_outside(taps[i], w, inside[i].word);
  return outside == 0;
}
PYFAST_XAI_ON_EACH_MACHINE(bool, all_of_windows,
                           (const uint8_t* taps, int64_t count, const Width& width, const Inside* inside),
                           (taps, count, width, inside))

// All windows of a plane, and the columns [begin, end) of those that lie inside with all of their columns.
struct Windows {
  std::vector<Inside> inside;
  std::vector<char> full_row;
  int64_t begin = 0, end;

  explicit Windows(const Pool& pool) : end(pool.output[1]) {
    const auto full = [&](int d, const Taps& taps) { return taps.begin == 0 && taps.end == pool.kernel[d]; };
    std::vector<Taps> columns;
    for (int64_t x = 0; x < pool.output[1]; ++x) columns.emplace_back(pool, 1, x);
    while (begin < end && !full(1, columns[begin])) ++begin;
    while (end > begin && !full(1, columns[end - 1])) --end;
    inside.reserve(pool.output[0] * pool.output[1]);
    for (int64_t y = 0; y < pool.output[0]; ++y) {
      const Taps rows(pool, 0, y);
      full_row.push_back(full(0, rows));
      for (const Taps& taps : columns) inside.emplace_back(rows, taps);
    }
  }
};

// Returns whether the taps of an image lie inside. Windows that lie inside as a whole need the largest tap alone.
bool image_inside(const uint8_t* offsets, const Pool& pool, const Windows& windows, const Width& width) {
  constexpr int64_t kShort = 32;  // a row up to this length is faster together with the others
  const int64_t lanes = pool.lanes, row_length = pool.output[1];
  if (lanes == 1 && row_length < kShort) {
    return all_of_windows(offsets, pool.output_size(), width, windows.inside.data());
  }
  const auto windows_inside = [&](const uint8_t* row, const Inside* inside, int64_t from, int64_t to) {
    if (lanes == 1) return all_of_windows(row + from, to - from, width, inside + from);
    for (int64_t x = from; x < to; ++x) {
      if (!all_of_window(row + x * lanes, lanes, width, inside[x])) return false;
    }
    return true;
  };
  for (int64_t y = 0; y < pool.output[0]; ++y) {
    const uint8_t* row = offsets + y * row_length * lanes;
    const Inside* inside = windows.inside.data() + y * row_length;
    const int64_t begin = windows.full_row[y] ? windows.begin : row_length;
    const int64_t end = windows.full_row[y] ? windows.end : row_length;
    if (!windows_inside(row, inside, 0, begin) || !windows_inside(row, inside, end, row_length)) return false;
    if (begin < end && largest_byte(row + begin * lanes, (end - begin) * lanes) >= pool.kernel[0] * pool.kernel[1]) {
      return false;
    }
  }
  return true;
}

bool all_inside(const Tensor& offsets, const Pool& pool) {
  const Windows windows(pool);
  const Width width(pool);
  const auto* values = static_cast<const uint8_t*>(offsets.const_data_ptr());
  std::atomic<bool> inside{true};
  const int64_t grain = std::max<int64_t>(1, 65536 / pool.output_size());
  torch::stable::parallel_for(0, pool.images, grain, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      if (!image_inside(values + image * pool.output_size(), pool, windows, width)) inside.store(false);
    }
  });
  return inside.load();
}

}  // namespace

std::optional<int64_t> first_tap_outside(const Tensor& offsets, const Tensor& map, const List& kernel,
                                         const List& stride, const List& padding, const List& dilation) {
  if (offsets.numel() == 0) return std::nullopt;
  const bool pixels = pixels_follow(offsets), planes = planes_follow(offsets);
  const Pool pool = pool_of(offsets, map, offsets, kernel, stride, padding, dilation, pixels);
  if ((pixels || planes) && all_inside(offsets, pool)) return std::nullopt;
  const auto* values = static_cast<const uint8_t*>(offsets.const_data_ptr());
  for (int64_t n = 0; n < offsets.size(0); ++n) {
    for (int64_t c = 0; c < offsets.size(1); ++c) {
      for (int64_t y = 0; y < pool.output[0]; ++y) {
        for (int64_t x = 0; x < pool.output[1]; ++x) {
          const int64_t at =
              n * offsets.stride(0) + c * offsets.stride(1) + y * offsets.stride(2) + x * offsets.stride(3);
          const Inside inside(Taps(pool, 0, y), Taps(pool, 1, x));
          if (lies_outside(values[at], Width(pool), inside.word)) return values[at];
        }
      }
    }
  }
  return std::nullopt;
}

}  // namespace pyfast_xai::checks
