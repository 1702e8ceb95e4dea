#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "checks.h"
#include "cuda/bitmap.h"
#include "cuda/point_check.h"
#include "dispatch.h"
#include "pyfast_xai/bits.h"

namespace pyfast_xai {
namespace {

constexpr int kThreads = 128, kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Sizes of a fully connected layer [rows, columns] -> [rows, outputs] whose weight is rows of words of bits.
struct LinearLayer {
  int64_t rows, columns, outputs, words;
};

// Bits of the chosen neurons, [rows, 2, words_for(outputs)], ordinary points before negative ones: the points of a row
// come together without a sort, and each once.
__global__ void __launch_bounds__(kThreads) select_kernel(const int64_t* points, const bool* negative, int64_t count,
                                                          int64_t rows, int64_t outputs, uint64_t* selected) {
  const int64_t words = words_for(outputs), step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += step) {
    if (!is_point(points[i], rows * outputs)) continue;
    const int64_t row = points[i] / outputs, neuron = points[i] % outputs;
    uint64_t* set = selected + (2 * row + (negative && negative[i])) * words;
    atomicOr(reinterpret_cast<unsigned long long*>(set + neuron / kWordBits), bit_of(neuron));
  }
}

// Bits of input > 0 and input < 0, [rows, words]; a NaN sets neither. One warp a word, so that reads are coalesced.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sign_kernel(const T* input, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns,
                uint64_t* above, uint64_t* below) {
  const int lane = threadIdx.x % kWarp;
  const int64_t words = words_for(columns), step = int64_t{gridDim.x} * (kThreads / kWarp);
  for (int64_t i = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp; i < rows * words; i += step) {
    const T* row = input + i / words * row_stride;
    const int64_t first = i % words * kWordBits;
    uint64_t positive = 0, negative = 0;
    for (int half = 0; half < 2; ++half) {
      const int64_t column = first + half * kWarp + lane;
      const auto value = column < columns ? static_cast<Accumulated<T>>(row[column * column_stride]) : 0;
      positive |= uint64_t{__ballot_sync(kAllLanes, value > 0)} << (half * kWarp);
      negative |= uint64_t{__ballot_sync(kAllLanes, value < 0)} << (half * kWarp);
    }
    if (lane == 0) {
      above[i] = positive;
      below[i] = negative;
    }
  }
}

// Unites the weight bits of a row's neurons word by word and keeps the inputs whose sign agrees. The result replaces
// `above`.
__global__ void __launch_bounds__(kThreads)
    unite_kernel(const uint64_t* weight_positive, const uint64_t* weight_negative, const uint64_t* selected,
                 int64_t rows, int64_t outputs, int64_t words, uint64_t* above, const uint64_t* below) {
  const int64_t neuron_words = words_for(outputs), blocks = (words + kThreads - 1) / kThreads;
  for (int64_t task = blockIdx.x; task < rows * blocks; task += gridDim.x) {
    const int64_t row = task / blocks, word = task % blocks * kThreads + threadIdx.x;
    if (word >= words) continue;
    const uint64_t up = above[row * words + word], down = below[row * words + word];
    uint64_t excites_up = 0, excites_down = 0;
    for (int flip = 0; flip < 2; ++flip) {
      const uint64_t* set = selected + (2 * row + flip) * neuron_words;
      const uint64_t* agreeing = (flip ? weight_negative : weight_positive) + word;
      const uint64_t* opposing = (flip ? weight_positive : weight_negative) + word;
      for (int64_t s = 0; s < neuron_words; ++s) {
        // With random signs the first twenty neurons reach every input, of however many thousand neurons.
        if (!((up & ~excites_up) | (down & ~excites_down))) break;
        for (uint64_t left = set[s]; left; left &= left - 1) {
          const int64_t neuron = s * kWordBits + lowest_bit(left);
          excites_up |= agreeing[neuron * words];
          excites_down |= opposing[neuron * words];
        }
      }
    }
    above[row * words + word] = (up & excites_up) | (down & excites_down);
  }
}

template <class T>
void launch_signs(const Tensor& input, const LinearLayer& layer, uint64_t* above, uint64_t* below,
                  cudaStream_t stream) {
  sign_kernel<T><<<blocks_for(layer.rows * layer.words, kThreads / kWarp), kThreads, 0, stream>>>(
      static_cast<const T*>(input.const_data_ptr()), input.stride(0), input.stride(1), layer.rows, layer.columns, above,
      below);
  check_launch("sign_kernel");
}

Tensor linear_trace(const Tensor& input, const Tensor& weight_positive, const Tensor& weight_negative,
                    const Tensor& points, std::optional<Tensor> negative, std::optional<int64_t> capacity) {
  checks::linear_trace(input, weight_positive, weight_negative, points, negative, capacity);
  const LinearLayer layer{input.size(0), input.size(1), weight_positive.size(0), words_for(input.size(1))};
  const DeviceScope scope(input);
  const cudaStream_t stream = scope.stream();
  const Tensor list = torch::stable::contiguous(points);
  const Tensor flips = negative ? torch::stable::contiguous(*negative) : list;
  const Tensor positive_rows = torch::stable::contiguous(weight_positive);
  const Tensor negative_rows = torch::stable::contiguous(weight_negative);
  const int64_t count = list.numel(), total = layer.rows * layer.words;

  const Tensor selection = cleared_words(list, 2 * layer.rows * words_for(layer.outputs), stream);
  const Tensor signs = torch::stable::new_empty(list, {2, total}, ScalarType::Long);
  auto* selected = static_cast<uint64_t*>(selection.mutable_data_ptr());
  auto* above = static_cast<uint64_t*>(signs.mutable_data_ptr());
  auto* below = above + total;
  if (count > 0) {
    select_kernel<<<blocks_for(count, kThreads), kThreads, 0, stream>>>(
        static_cast<const int64_t*>(list.const_data_ptr()),
        negative ? static_cast<const bool*>(flips.const_data_ptr()) : nullptr, count, layer.rows, layer.outputs,
        selected);
    check_launch("select_kernel");
  }
  dispatch_floating(input, [&](auto type) {
    if (total > 0) launch_signs<typename decltype(type)::type>(input, layer, above, below, stream);
  });
  if (total > 0) {
    const int64_t blocks = (layer.words + kThreads - 1) / kThreads;
    unite_kernel<<<blocks_for(layer.rows * blocks, 1), kThreads, 0, stream>>>(
        static_cast<const uint64_t*>(positive_rows.const_data_ptr()),
        static_cast<const uint64_t*>(negative_rows.const_data_ptr()), selected, layer.rows, layer.outputs, layer.words,
        above, below);
    check_launch("unite_kernel");
  }
  const int64_t most = std::min(layer.rows, count) * layer.columns;
  return set_positions(above, layer.rows, layer.words, layer.columns, most, capacity, list, stream);
}

}  // namespace
}  // namespace pyfast_xai

STABLE_TORCH_LIBRARY_IMPL(pyfast_xai_cuda, CUDA, m) { m.impl("linear_trace", TORCH_BOX(&pyfast_xai::linear_trace)); }
