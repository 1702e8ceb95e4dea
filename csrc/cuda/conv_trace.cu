#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "checks.h"
#include "convolution.h"
#include "cuda/device.h"
#include "cuda/point_check.h"
#include "dispatch.h"
#include "pyfast_xai/argmax.h"
#include "pyfast_xai/window.h"

namespace pyfast_xai {
namespace {

constexpr int kThreads = 128, kWarp = 32, kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// The strongest of a warp's candidates, in every lane. The order is total, so every tree of comparisons agrees.
template <class A>
__device__ Ranked<A> strongest_of_warp(Ranked<A> mine) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const Ranked<A> other{__shfl_xor_sync(kAllLanes, mine.value, step),
                          static_cast<int64_t>(__shfl_xor_sync(kAllLanes, static_cast<long long>(mine.index), step))};
    mine = stronger(mine, other);
  }
  return mine;
}

// Sum over the window of one channel; `field` and `filter` point at that channel's first element.
template <class T>
__device__ Accumulated<T> channel_sum(const Convolution& conv, const Window& window, const T* field,
                                      const Strides& field_strides, const T* filter, const Strides& filter_strides) {
  using A = Accumulated<T>;
  const TapRange* range = window.inside;
  const int64_t field_step = conv.dilation[2] * field_strides.spatial[2];
  A sum = 0;
  for (int64_t i = range[0].begin; i < range[0].end; ++i) {
    for (int64_t j = range[1].begin; j < range[1].end; ++j) {
      const Tap tap = tap_at(conv, window, i, j, range[2].begin);
      const T* x = field + field_strides.offset(tap.at);
      const T* w = filter + filter_strides.offset(tap.kernel);
      for (int64_t k = range[2].begin; k < range[2].end; ++k) {
        sum += static_cast<A>(*x) * static_cast<A>(*w);
        x += field_step;
        w += filter_strides.spatial[2];
      }
    }
  }
  return sum;
}

// One warp a point: lanes over channels for the sums, which is coalesced where channels are innermost, and over taps
// for the place.
template <class T>
__global__ void __launch_bounds__(kThreads)
    conv_trace_kernel(Convolution conv, Location location, const T* input, Strides input_strides, const T* weight,
                      Strides weight_strides, const int64_t* points, const bool* negative, int64_t count,
                      int64_t* out) {
  using A = Accumulated<T>;
  const int lane = threadIdx.x % kWarp;
  const int64_t size = conv.images * conv.filters * conv.outputs(), step = int64_t{gridDim.x} * kWarps;
  // A warp's lanes share p and so every branch but those over their own channels and taps: shuffles see all of them.
  for (int64_t p = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp; p < count; p += step) {
    if (!is_point(points[p], size)) {
      if (lane == 0) out[p] = -1;
      continue;
    }
    const OutputPoint point = unravel_output(conv, points[p]);
    const Window window = window_of(conv, point);
    const A sign = negative && negative[p] ? A(-1) : A(1);
    const int64_t first = first_channel(conv, point.filter);
    const T* field = input + point.image * input_strides.outer + first * input_strides.channel;
    const T* filter = weight + point.filter * weight_strides.outer;

    Ranked<A> best = lowest_rank<A>();
    for (int64_t c = lane; c < conv.group_channels; c += kWarp) {
      const A sum = channel_sum(conv, window, field + c * input_strides.channel, input_strides,
                                filter + c * weight_strides.channel, weight_strides);
      best = stronger(best, Ranked<A>{sign * sum, c});
    }
    const int64_t channel = strongest_of_warp(best).index;

    int64_t at[kSpatial];
    if (!place_without_values(conv, point, window, location, at)) {
      field += channel * input_strides.channel;
      filter += channel * weight_strides.channel;
      Ranked<A> place = lowest_rank<A>();
      for (int64_t t = lane; t < window.taps(); t += kWarp) {
        const Tap tap = nth_tap(conv, window, t);
        const A value = tap_value(location, static_cast<A>(field[input_strides.offset(tap.at)]),
                                  static_cast<A>(filter[weight_strides.offset(tap.kernel)]), sign);
        place = stronger(place, Ranked<A>{value, t});
      }
      const Tap tap = nth_tap(conv, window, strongest_of_warp(place).index);
      for (int d = 0; d < kSpatial; ++d) at[d] = tap.at[d];
    }
    if (lane == 0) out[p] = ravel_input(conv, point.image, first + channel, at);
  }
}

template <class T>
void launch(const Convolution& conv, Location location, const Tensor& input, const Tensor& weight,
            const int64_t* points, const bool* negative, int64_t count, int64_t* out, cudaStream_t stream) {
  conv_trace_kernel<T><<<blocks_for(count, kWarps), kThreads, 0, stream>>>(
      conv, location, static_cast<const T*>(input.const_data_ptr()), strides_of(input),
      static_cast<const T*>(weight.const_data_ptr()), strides_of(weight), points, negative, count, out);
  check_launch("conv_trace_kernel");
}

Tensor conv_trace(const Tensor& input, const Tensor& weight, const Tensor& points, std::optional<Tensor> negative,
                  std::vector<int64_t> output_size, std::vector<int64_t> stride, std::vector<int64_t> padding,
                  std::vector<int64_t> dilation, int64_t groups, int64_t location) {
  checks::conv_trace(input, weight, points, negative, output_size, stride, padding, dilation, groups, location);
  const Convolution conv = convolution_of(input, weight, output_size, stride, padding, dilation, groups);
  const int64_t count = points.numel();

  const DeviceScope scope(input);
  const Tensor list = torch::stable::contiguous(points);
  const Tensor flips = negative ? torch::stable::contiguous(*negative) : list;
  const auto* flat = static_cast<const int64_t*>(list.const_data_ptr());
  Tensor out = torch::stable::new_empty(list, {count}, ScalarType::Long);
  dispatch_floating(input, [&](auto type) {
    if (count == 0) return;
    launch<typename decltype(type)::type>(conv, static_cast<Location>(location), input, weight, flat,
                                          negative ? static_cast<const bool*>(flips.const_data_ptr()) : nullptr, count,
                                          static_cast<int64_t*>(out.mutable_data_ptr()), scope.stream());
  });
  return out;
}

}  // namespace
}  // namespace pyfast_xai

STABLE_TORCH_LIBRARY_IMPL(pyfast_xai_cuda, CUDA, m) { m.impl("conv_trace", TORCH_BOX(&pyfast_xai::conv_trace)); }
