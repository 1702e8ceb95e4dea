#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <limits>

#include "checks.h"
#include "cpu/max_pool.h"
#include "cpu/simd.h"

namespace pyfast_xai {
namespace {

constexpr int64_t kLanes = 64;  // channels of one pass

// Reduces one window of up to 64 lanes. The first of equal numbers wins and a NaN wins over all, as in ATen.
template <class T>
PYFAST_XAI_INLINE void pool_window(const T* image, const Pool& pool, const Taps& rows, const Taps& columns,
                                   int64_t lanes, T* output, uint8_t* offsets) {
  using A = Accumulated<T>;
  using Place = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;  // as wide as a number: both fill one vector
  A best[kLanes];
  Place where[kLanes];
  const auto first = static_cast<Place>(rows.begin * pool.kernel[1] + columns.begin);
  for (int64_t j = 0; j < lanes; ++j) best[j] = -std::numeric_limits<A>::infinity(), where[j] = first;
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    for (int64_t c = columns.begin; c < columns.end; ++c) {
      const int64_t y = rows.start + r * pool.dilation[0], x = columns.start + c * pool.dilation[1];
      const T* values = image + (y * pool.input[1] + x) * pool.lanes;
      const auto place = static_cast<Place>(r * pool.kernel[1] + c);
      for (int64_t j = 0; j < lanes; ++j) {
        const A value = static_cast<A>(values[j]);
        const bool wins = (value > best[j]) | (value != value);
        best[j] = wins ? value : best[j];
        where[j] = wins ? place : where[j];
      }
    }
  }
  for (int64_t j = 0; j < lanes; ++j) {
    output[j] = static_cast<T>(best[j]);
    offsets[j] = static_cast<uint8_t>(where[j]);
  }
}

// Reduces one row of windows.
template <class Machine, class T>
PYFAST_XAI_INLINE void pool_row_on(const T* image, const Pool& pool, int64_t row, T* output, uint8_t* offsets) {
  const Taps rows(pool, 0, row);
  for (int64_t column = 0; column < pool.output[1]; ++column) {
    const Taps columns(pool, 1, column);
    const int64_t at = (row * pool.output[1] + column) * pool.lanes;
    int64_t lane = 0;
    for (; lane + kLanes <= pool.lanes; lane += kLanes) {
      pool_window(image + lane, pool, rows, columns, kLanes, output + at + lane, offsets + at + lane);
    }
    if (lane < pool.lanes) {
      pool_window(image + lane, pool, rows, columns, pool.lanes - lane, output + at + lane, offsets + at + lane);
    }
  }
}

PYFAST_XAI_ON_EACH_MACHINE(void, pool_row,
                           (const float* image, const Pool& pool, int64_t row, float* output, uint8_t* offsets),
                           (image, pool, row, output, offsets))
PYFAST_XAI_ON_EACH_MACHINE(void, pool_row,
                           (const double* image, const Pool& pool, int64_t row, double* output, uint8_t* offsets),
                           (image, pool, row, output, offsets))
PYFAST_XAI_ON_EACH_MACHINE(void, pool_row,
                           (const Half* image, const Pool& pool, int64_t row, Half* output, uint8_t* offsets),
                           (image, pool, row, output, offsets))
PYFAST_XAI_ON_EACH_MACHINE(void, pool_row,
                           (const BFloat16* image, const Pool& pool, int64_t row, BFloat16* output, uint8_t* offsets),
                           (image, pool, row, output, offsets))

void max_pool_forward(const Tensor& input, std::vector<int64_t> kernel, std::vector<int64_t> stride,
                      std::vector<int64_t> padding, std::vector<int64_t> dilation, const Tensor& output,
                      const Tensor& offsets) {
  checks::max_pool_forward(input, kernel, stride, padding, dilation, output, offsets);
  const bool pixels = pixels_follow(input, output, offsets);
  const Pool pool = pool_of(input, input, output, kernel, stride, padding, dilation, pixels);
  dispatch_floating(input, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto* from = static_cast<const T*>(input.const_data_ptr());
    auto* to = static_cast<T*>(output.mutable_data_ptr());
    auto* places = static_cast<uint8_t*>(offsets.mutable_data_ptr());
    const int64_t rows = pool.output[0], row_cost = std::max<int64_t>(1, pool.output[1] * pool.lanes);
    torch::stable::parallel_for(0, pool.images * rows, std::max<int64_t>(1, 8192 / row_cost),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t task = begin; task < end; ++task) {
                                    const int64_t image = task / rows, at = image * pool.output_size();
                                    pool_row(from + image * pool.input_size(), pool, task % rows, to + at, places + at);
                                  }
                                });
  });
}

}  // namespace
}  // namespace pyfast_xai

STABLE_TORCH_LIBRARY_IMPL(pyfast_xai, CPU, m) { m.impl("max_pool_forward", TORCH_BOX(&pyfast_xai::max_pool_forward)); }
