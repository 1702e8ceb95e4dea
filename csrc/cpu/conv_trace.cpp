#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "convolution.h"
#include "cpu/simd.h"
#include "dispatch.h"
#include "pyfast_xai/argmax.h"
#include "pyfast_xai/window.h"

namespace pyfast_xai {
namespace {

// sums[c] = sign * sum over taps of fields[t][c] * filters[t][c]; returns the first c with the largest sum, or the
// first NaN. The taps of a block of channels are summed in registers.
template <class Machine, class A>
PYFAST_XAI_INLINE int64_t strongest_channel_on(const A* const* fields, const A* const* filters, int64_t taps,
                                               int64_t channels, A sign, A* sums) {
  using Lanes = typename Vector<A, Machine>::type;
  constexpr int64_t kLanes = Vector<A, Machine>::kLanes, kBlock = 128 / sizeof(A), kVectors = kBlock / kLanes;
  Lanes top = {};
  top -= std::numeric_limits<A>::infinity();
  auto nan = top != top;
  int64_t c = 0;
  for (; c + kBlock <= channels; c += kBlock) {
    Lanes block[kVectors] = {};
    for (int64_t t = 0; t < taps; ++t) {
      const A* field = fields[t] + c;
      const A* filter = filters[t] + c;
      for (int64_t v = 0; v < kVectors; ++v)
        block[v] += lanes<Machine>(field + v * kLanes)->all * lanes<Machine>(filter + v * kLanes)->all;
    }
    for (int64_t v = 0; v < kVectors; ++v) {
      block[v] *= sign;
      top = block[v] > top ? block[v] : top;
      nan |= block[v] != block[v];
      lanes<Machine>(sums + c + v * kLanes)->all = block[v];
    }
  }
  A best = -std::numeric_limits<A>::infinity();
  bool has_nan = false;
  for (int64_t v = 0; v < kLanes; ++v) {
    best = top[v] > best ? top[v] : best;
    has_nan |= nan[v] != 0;
  }
  for (; c < channels; ++c) {
    A sum = 0;
    for (int64_t t = 0; t < taps; ++t) sum += fields[t][c] * filters[t][c];
    sums[c] = sum * sign;
    best = sums[c] > best ? sums[c] : best;
    has_nan |= sums[c] != sums[c];
  }
  c = 0;
  if (has_nan) {
    while (sums[c] == sums[c]) ++c;
  } else {
    // The search goes block by block first: channel by channel it would take longer than the sums.
    Lanes wanted = {};
    wanted += best;
    for (; c + kBlock <= channels; c += kBlock) {
      auto hit = lanes<Machine>(sums + c)->all == wanted;
      for (int64_t v = 1; v < kVectors; ++v) hit |= lanes<Machine>(sums + c + v * kLanes)->all == wanted;
      bool any = false;
      for (int64_t v = 0; v < kLanes; ++v) any |= hit[v] != 0;
      if (any) break;
    }
    while (sums[c] != best) ++c;
  }
  return c;
}

PYFAST_XAI_ON_EACH_MACHINE(int64_t, strongest_channel,
                           (const float* const* fields, const float* const* filters, int64_t taps, int64_t channels,
                            float sign, float* sums),
                           (fields, filters, taps, channels, sign, sums))
PYFAST_XAI_ON_EACH_MACHINE(int64_t, strongest_channel,
                           (const double* const* fields, const double* const* filters, int64_t taps, int64_t channels,
                            double sign, double* sums),
                           (fields, filters, taps, channels, sign, sums))

template <class T>
struct Strided : Strides {
  const T* data;

  explicit Strided(const Tensor& tensor)
      : Strides(strides_of(tensor)), data(static_cast<const T*>(tensor.const_data_ptr())) {}

  Strided(const T* values, const Convolution& conv) : data(values) {
    outer = conv.positions() * conv.channels;
    channel = 1;
    spatial[2] = conv.channels;
    spatial[1] = spatial[2] * conv.spatial[2];
    spatial[0] = spatial[1] * conv.spatial[1];
  }
};

// Copies the whole input to [N, *spatial, C], which is cheaper than gathering windows that overlap much.
template <class T>
std::vector<Accumulated<T>> channels_last(const Strided<T>& input, const Convolution& conv) {
  constexpr int64_t kTile = 16;  // cache lines written at once
  const int64_t positions = conv.positions(), tiles = (positions + kTile - 1) / kTile;
  std::vector<Accumulated<T>> copy(conv.images * positions * conv.channels);
  torch::stable::parallel_for(0, conv.images * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / tiles, first = task % tiles * kTile, size = std::min(kTile, positions - first);
      int64_t offsets[kTile];
      for (int64_t i = 0; i < size; ++i) {
        const int64_t flat = first + i, row = flat / conv.spatial[2];
        const int64_t at[] = {row / conv.spatial[1], row % conv.spatial[1], flat % conv.spatial[2]};
        offsets[i] = image * input.outer + input.offset(at);
      }
      auto* out = copy.data() + (image * positions + first) * conv.channels;
      for (int64_t c = 0; c < conv.channels; ++c) {
        const T* plane = input.data + c * input.channel;
        for (int64_t i = 0; i < size; ++i) {
          out[i * conv.channels + c] = static_cast<Accumulated<T>>(plane[offsets[i]]);
        }
      }
    }
  });
  return copy;
}

// Traces points one after the other; a filter is packed once if its points follow each other.
template <class T>
class Tracer {
 public:
  using A = Accumulated<T>;

  Tracer(const Convolution& conv, Location location, const Strided<T>& input, const Strided<T>& weight,
         const std::optional<Strided<A>>& rows)
      : conv_(conv), location_(location), input_(input), weight_(weight), rows_(rows), sums_(conv.group_channels) {
    const int64_t taps = conv.taps();
    inside_.reserve(taps);
    fields_.reserve(taps);
    filters_.reserve(taps);
    if (!rows_) window_.resize(taps * conv.group_channels);
    if (!weight_in_place()) filter_.resize(taps * conv.group_channels);
  }

  int64_t trace(int64_t flat, bool negative) {
    const OutputPoint point = unravel_output(conv_, flat);
    const Window window = window_of(conv_, point);
    find_taps(window);
    find_window(point);
    find_filter(point.filter);
    const A sign = negative ? A(-1) : A(1);
    const int64_t channel = strongest_channel(fields_.data(), filters_.data(), static_cast<int64_t>(inside_.size()),
                                              conv_.group_channels, sign, sums_.data());
    int64_t at[kSpatial];
    if (!place_without_values(conv_, point, window, location_, at)) {
      std::copy_n(inside_[strongest_tap(channel, sign)].at, kSpatial, at);
    }
    return ravel_input(conv_, point.image, first_channel(conv_, point.filter) + channel, at);
  }

 private:
  bool weight_in_place() const { return std::is_same_v<T, A> && (weight_.channel == 1 || conv_.group_channels == 1); }

  void find_taps(const Window& window) {
    const TapRange* range = window.inside;
    inside_.clear();
    for (int64_t i = range[0].begin; i < range[0].end; ++i) {
      for (int64_t j = range[1].begin; j < range[1].end; ++j) {
        for (int64_t k = range[2].begin; k < range[2].end; ++k) inside_.push_back(tap_at(conv_, window, i, j, k));
      }
    }
  }

  void find_window(const OutputPoint& point) {
    const int64_t channel = first_channel(conv_, point.filter), channels = conv_.group_channels;
    fields_.clear();
    if (rows_) {
      const A* base = rows_->data + point.image * rows_->outer + channel * rows_->channel;
      for (const Tap& tap : inside_) fields_.push_back(base + rows_->offset(tap.at));
      return;
    }
    const T* base = input_.data + point.image * input_.outer + channel * input_.channel;
    for (size_t t = 0; t < inside_.size(); ++t) {
      fields_.push_back(window_.data() + t * channels);
      offsets_[t % kGather] = input_.offset(inside_[t].at);
      if (t % kGather == kGather - 1 || t + 1 == inside_.size()) gather(base, t - t % kGather, t + 1);
    }
  }

  // Channel by channel, for the taps of a channel are neighbours in memory.
  void gather(const T* base, size_t begin, size_t end) {
    const int64_t channels = conv_.group_channels;
    for (int64_t c = 0; c < channels; ++c) {
      const T* plane = base + c * input_.channel;
      for (size_t t = begin; t < end; ++t) window_[t * channels + c] = static_cast<A>(plane[offsets_[t - begin]]);
    }
  }

  void find_filter(int64_t filter) {
    const int64_t channels = conv_.group_channels;
    if (filter != current_filter_ && !weight_in_place()) pack_filter(filter);
    current_filter_ = filter;
    filters_.clear();
    for (const Tap& tap : inside_) {
      if constexpr (std::is_same_v<T, A>) {
        if (weight_in_place()) {
          filters_.push_back(weight_.data + filter * weight_.outer + weight_.offset(tap.kernel));
          continue;
        }
      }
      filters_.push_back(filter_.data() + packed_index(tap.kernel) * channels);
    }
  }

  int64_t packed_index(const int64_t* at) const { return (at[0] * conv_.kernel[1] + at[1]) * conv_.kernel[2] + at[2]; }

  void pack_filter(int64_t filter) {
    const int64_t channels = conv_.group_channels;
    for (int64_t t = 0; t < conv_.taps(); ++t) {
      const int64_t row = t / conv_.kernel[2];
      const int64_t at[] = {row / conv_.kernel[1], row % conv_.kernel[1], t % conv_.kernel[2]};
      const T* from = weight_.data + filter * weight_.outer + weight_.offset(at);
      A* to = filter_.data() + t * channels;
      for (int64_t c = 0; c < channels; ++c) to[c] = static_cast<A>(from[c * weight_.channel]);
    }
  }

  int64_t strongest_tap(int64_t channel, A sign) const {
    Ranked<A> best = lowest_rank<A>();
    for (size_t t = 0; t < inside_.size(); ++t) {
      const A value = tap_value(location_, fields_[t][channel], filters_[t][channel], sign);
      best = stronger(best, Ranked<A>{value, static_cast<int64_t>(t)});
    }
    return best.index;
  }

  static constexpr size_t kGather = 64;  // taps gathered in one pass over the channels

  const Convolution& conv_;
  Location location_;
  const Strided<T>& input_;
  const Strided<T>& weight_;
  const std::optional<Strided<A>>& rows_;  // a copy of the input with its channels side by side, if one was made
  std::vector<A> sums_, window_, filter_;
  std::vector<Tap> inside_;
  std::vector<const A*> fields_, filters_;
  int64_t offsets_[kGather];
  int64_t current_filter_ = -1;
};

// Numbers of the points, those of a filter side by side; a point of -1 is none.
std::vector<int64_t> order_by_filter(const Convolution& conv, const int64_t* points, int64_t count) {
  const int64_t outputs = conv.outputs();
  std::vector<int64_t> next(conv.filters + 1, 0);
  for (int64_t i = 0; i < count; ++i) {
    if (points[i] >= 0) ++next[points[i] / outputs % conv.filters + 1];
  }
  for (int64_t f = 0; f < conv.filters; ++f) next[f + 1] += next[f];
  std::vector<int64_t> order(next[conv.filters]);
  for (int64_t i = 0; i < count; ++i) {
    if (points[i] >= 0) order[next[points[i] / outputs % conv.filters]++] = i;
  }
  return order;
}

template <class T>
void trace_all(const Convolution& conv, Location location, const Tensor& input, const Tensor& weight,
               const int64_t* points, const bool* negative, int64_t count, int64_t* out) {
  using A = Accumulated<T>;
  const Strided<T> strided_input(input), strided_weight(weight);
  std::optional<Strided<A>> rows;
  std::vector<A> copy;
  if constexpr (std::is_same_v<T, A>) {
    if (input.stride(1) == 1 || conv.group_channels == 1) rows = strided_input;
  }
  const std::vector<int64_t> order = order_by_filter(conv, points, count);
  const int64_t present = static_cast<int64_t>(order.size()), window = conv.taps() * conv.group_channels;
  if (present < count) std::fill_n(out, count, -1);
  // Copying an element costs about half of gathering one.
  if (!rows && 2 * present >= input.numel() / window) {
    copy = channels_last(strided_input, conv);
    rows = Strided<A>(copy.data(), conv);
  }
  const int64_t grain = std::max<int64_t>(1, (1 << 18) / window);
  torch::stable::parallel_for(0, present, grain, [&](int64_t begin, int64_t end) {
    Tracer<T> tracer(conv, location, strided_input, strided_weight, rows);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = order[i];
      out[p] = tracer.trace(points[p], negative && negative[p]);
    }
  });
}

Tensor conv_trace(const Tensor& input, const Tensor& weight, const Tensor& points, std::optional<Tensor> negative,
                  std::vector<int64_t> output_size, std::vector<int64_t> stride, std::vector<int64_t> padding,
                  std::vector<int64_t> dilation, int64_t groups, int64_t location) {
  checks::conv_trace(input, weight, points, negative, output_size, stride, padding, dilation, groups, location);
  const Convolution conv = convolution_of(input, weight, output_size, stride, padding, dilation, groups);
  const Tensor list = torch::stable::contiguous(points);
  const Tensor flips = negative ? torch::stable::contiguous(*negative) : list;
  const int64_t count = list.numel();
  const auto* flat = static_cast<const int64_t*>(list.const_data_ptr());

  Tensor out = torch::stable::empty({count}, ScalarType::Long);
  dispatch_floating(input, [&](auto type) {
    using T = typename decltype(type)::type;
    if (count == 0) return;
    trace_all<T>(conv, static_cast<Location>(location), input, weight, flat,
                 negative ? static_cast<const bool*>(flips.const_data_ptr()) : nullptr, count,
                 static_cast<int64_t*>(out.mutable_data_ptr()));
  });
  return out;
}

}  // namespace
}  // namespace pyfast_xai

STABLE_TORCH_LIBRARY_IMPL(pyfast_xai, CPU, m) { m.impl("conv_trace", TORCH_BOX(&pyfast_xai::conv_trace)); }
