#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "cpu/simd.h"
#include "dispatch.h"
#include "pyfast_xai/window.h"

namespace pyfast_xai {
namespace {

// sums[c] = sign * sum over taps of fields[t][c] * filters[t][c]; returns the first c with the largest sum, or the
// first NaN. The taps of 4 vectors of channels are summed in registers.
template <class A>
PYFAST_XAI_INLINE int64_t sum_and_select(const A* const* fields, const A* const* filters, int64_t taps,
                                         int64_t channels, A sign, A* sums) {
  constexpr int64_t kLanes = Vector<A>::kLanes, kBlock = 4 * kLanes;
  typename Vector<A>::type top = {};
  top -= std::numeric_limits<A>::infinity();
  auto nan = top != top;
  int64_t c = 0;
  for (; c + kBlock <= channels; c += kBlock) {
    typename Vector<A>::type block[4] = {};
    for (int64_t t = 0; t < taps; ++t) {
      const A* field = fields[t] + c;
      const A* filter = filters[t] + c;
      for (int v = 0; v < 4; ++v) block[v] += *lanes(field + v * kLanes) * *lanes(filter + v * kLanes);
    }
    for (int v = 0; v < 4; ++v) {
      block[v] *= sign;
      top = block[v] > top ? block[v] : top;
      nan |= block[v] != block[v];
      *lanes(sums + c + v * kLanes) = block[v];
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
    while (sums[c] != best) ++c;
  }
  return c;
}

PYFAST_XAI_CLONES int64_t strongest_channel(const float* const* fields, const float* const* filters, int64_t taps,
                                            int64_t channels, float sign, float* sums) {
  return sum_and_select(fields, filters, taps, channels, sign, sums);
}

PYFAST_XAI_CLONES int64_t strongest_channel(const double* const* fields, const double* const* filters, int64_t taps,
                                            int64_t channels, double sign, double* sums) {
  return sum_and_select(fields, filters, taps, channels, sign, sums);
}

// Elements of a tensor [N, C, d, h, w] or [O, C, d, h, w] at their strides.
template <class T>
struct Strided {
  const T* data;
  int64_t outer, channel;
  int64_t spatial[kSpatial];

  explicit Strided(const Tensor& tensor)
      : data(static_cast<const T*>(tensor.const_data_ptr())), outer(tensor.stride(0)), channel(tensor.stride(1)) {
    const int64_t missing = kSpatial + 2 - tensor.dim();
    for (int64_t d = 0; d < kSpatial; ++d) spatial[d] = d < missing ? 0 : tensor.stride(d - missing + 2);
  }

  Strided(const T* values, const Convolution& conv) : data(values), outer(conv.positions() * conv.channels), channel(1) {
    spatial[2] = conv.channels;
    spatial[1] = spatial[2] * conv.spatial[2];
    spatial[0] = spatial[1] * conv.spatial[1];
  }

  int64_t offset(const int64_t* at) const { return at[0] * spatial[0] + at[1] * spatial[1] + at[2] * spatial[2]; }
};

// Copies the whole input to [N, *spatial, C]: cheaper than gathering windows once these overlap enough.
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

// Traces points one after the other; the points of a filter should follow each other, so that it is packed once.
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
    find_taps(point);
    find_window(point);
    find_filter(point.filter);
    const A sign = negative ? A(-1) : A(1);
    const int64_t channel = strongest_channel(fields_.data(), filters_.data(), static_cast<int64_t>(inside_.size()),
                                              conv_.group_channels, sign, sums_.data());
    int64_t at[kSpatial];
    locate(point, channel, sign, at);
    return ravel_input(conv_, point.image, first_channel(point.filter) + channel, at);
  }

 private:
  struct Tap {
    int64_t index;  // in the filter, row-major
    int64_t at[kSpatial];
  };

  int64_t first_channel(int64_t filter) const { return filter / conv_.group_filters * conv_.group_channels; }

  bool weight_in_place() const {
    return std::is_same_v<T, A> && (weight_.channel == 1 || conv_.group_channels == 1);
  }

  void find_taps(const OutputPoint& point) {
    int64_t start[kSpatial];
    TapRange range[kSpatial];
    for (int d = 0; d < kSpatial; ++d) {
      start[d] = window_start(conv_, d, point.at[d]);
      range[d] = taps_inside(conv_, d, start[d]);
    }
    inside_.clear();
    for (int64_t i = range[0].begin; i < range[0].end; ++i) {
      for (int64_t j = range[1].begin; j < range[1].end; ++j) {
        for (int64_t k = range[2].begin; k < range[2].end; ++k) {
          inside_.push_back({(i * conv_.kernel[1] + j) * conv_.kernel[2] + k,
                             {start[0] + i * conv_.dilation[0], start[1] + j * conv_.dilation[1],
                              start[2] + k * conv_.dilation[2]}});
        }
      }
    }
  }

  void find_window(const OutputPoint& point) {
    const int64_t channel = first_channel(point.filter), channels = conv_.group_channels;
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
          filters_.push_back(weight_.data + filter * weight_.outer + weight_offset(tap.index));
          continue;
        }
      }
      filters_.push_back(filter_.data() + tap.index * channels);
    }
  }

  int64_t weight_offset(int64_t tap) const {
    const int64_t row = tap / conv_.kernel[2];
    const int64_t at[] = {row / conv_.kernel[1], row % conv_.kernel[1], tap % conv_.kernel[2]};
    return weight_.offset(at);
  }

  void pack_filter(int64_t filter) {
    const int64_t channels = conv_.group_channels;
    for (int64_t t = 0; t < conv_.taps(); ++t) {
      const T* from = weight_.data + filter * weight_.outer + weight_offset(t);
      A* to = filter_.data() + t * channels;
      for (int64_t c = 0; c < channels; ++c) to[c] = static_cast<A>(from[c * weight_.channel]);
    }
  }

  void locate(const OutputPoint& point, int64_t channel, A sign, int64_t* at) const {
    if (location_ == Location::kCenter || location_ == Location::kSame) {
      for (int d = 0; d < kSpatial; ++d) at[d] = fixed_coordinate(conv_, d, point.at[d], location_);
    } else if (inside_.empty()) {
      // The window lies in the padding: its first tap, brought to the border.
      for (int d = 0; d < kSpatial; ++d) at[d] = clamp_to_input(conv_, d, window_start(conv_, d, point.at[d]));
    } else {
      std::copy_n(inside_[strongest_tap(channel, sign)].at, kSpatial, at);
    }
  }

  size_t strongest_tap(int64_t channel, A sign) const {
    const auto value = [&](size_t t) {
      const A activation = fields_[t][channel];
      return location_ == Location::kActivation ? activation : sign * (activation * filters_[t][channel]);
    };
    size_t best = 0;
    for (size_t t = 1; t < inside_.size(); ++t) {
      if (beats(value(t), value(best))) best = t;
    }
    return best;
  }

  static constexpr size_t kGather = 64;  // taps gathered in one pass over the channels

  const Convolution& conv_;
  Location location_;
  const Strided<T>& input_;
  const Strided<T>& weight_;
  const std::optional<Strided<A>>& rows_;  // the input with its channels side by side, where there is one
  std::vector<A> sums_, window_, filter_;
  std::vector<Tap> inside_;
  std::vector<const A*> fields_, filters_;
  int64_t offsets_[kGather];
  int64_t current_filter_ = -1;
};

std::vector<int64_t> order_by_filter(const Convolution& conv, const int64_t* points, int64_t count) {
  const int64_t outputs = conv.outputs();
  std::vector<int64_t> next(conv.filters + 1, 0), order(count);
  for (int64_t i = 0; i < count; ++i) ++next[points[i] / outputs % conv.filters + 1];
  for (int64_t f = 0; f < conv.filters; ++f) next[f + 1] += next[f];
  for (int64_t i = 0; i < count; ++i) order[next[points[i] / outputs % conv.filters]++] = i;
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
  const int64_t window = conv.taps() * conv.group_channels;
  // Copying an element costs about half of gathering one.
  if (!rows && 2 * count >= input.numel() / window) {
    copy = channels_last(strided_input, conv);
    rows = Strided<A>(copy.data(), conv);
  }
  const std::vector<int64_t> order = order_by_filter(conv, points, count);
  const int64_t grain = std::max<int64_t>(1, (1 << 18) / window);
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    Tracer<T> tracer(conv, location, strided_input, strided_weight, rows);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = order[i];
      out[p] = tracer.trace(points[p], negative && negative[p]);
    }
  });
}

void fill_spatial(int64_t* padded, const std::vector<int64_t>& values, int64_t missing_value, const char* name,
                  int64_t least) {
  for (int d = 0; d < kSpatial; ++d) padded[d] = missing_value;
  const size_t missing = kSpatial - values.size();
  for (size_t d = 0; d < values.size(); ++d) {
    check(values[d] >= least, name, " must be at least ", least, " in every dimension, got ",
          Listed<std::vector<int64_t>>{values});
    padded[missing + d] = values[d];
  }
}

Convolution convolution_of(const Tensor& input, const Tensor& weight, const std::vector<int64_t>& output_size,
                           const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                           const std::vector<int64_t>& dilation, int64_t groups) {
  const int64_t spatial = input.dim() - 2;
  check(spatial >= 1 && spatial <= kSpatial, "input must have shape [N, C, *spatial] with one to three spatial "
        "dimensions, got ", ShapeOf{input});
  check(weight.dim() == input.dim(), "weight must have shape [O, C / groups, *kernel] with ", spatial,
        " kernel dimensions, got ", ShapeOf{weight});
  check_dtype(weight, "weight", input.scalar_type());
  check(groups >= 1 && input.size(1) == weight.size(1) * groups && weight.size(0) % groups == 0,
        "groups must divide input of shape ", ShapeOf{input}, " and weight of shape ", ShapeOf{weight},
        " into matching channels, got ", groups);
  const auto check_length = [&](const std::vector<int64_t>& values, const char* name) {
    check(static_cast<int64_t>(values.size()) == spatial, name, " must have ", spatial, " entries, got ",
          Listed<std::vector<int64_t>>{values});
  };
  check_length(output_size, "output_size");
  check_length(stride, "stride");
  check_length(padding, "padding");
  check_length(dilation, "dilation");

  const auto sizes = input.sizes(), kernel = weight.sizes();
  Convolution conv{};
  conv.images = sizes[0];
  conv.channels = sizes[1];
  conv.filters = kernel[0];
  conv.group_channels = kernel[1];
  conv.group_filters = kernel[0] / groups;
  fill_spatial(conv.spatial, {sizes.begin() + 2, sizes.end()}, 1, "input size", 0);
  fill_spatial(conv.kernel, {kernel.begin() + 2, kernel.end()}, 1, "kernel size", 0);
  fill_spatial(conv.output, output_size, 1, "output_size", 0);
  fill_spatial(conv.stride, stride, 1, "stride", 1);
  fill_spatial(conv.padding, padding, 0, "padding", 0);
  fill_spatial(conv.dilation, dilation, 1, "dilation", 1);
  return conv;
}

Tensor conv_trace(const Tensor& input, const Tensor& weight, const Tensor& points, std::optional<Tensor> negative,
                  std::vector<int64_t> output_size, std::vector<int64_t> stride, std::vector<int64_t> padding,
                  std::vector<int64_t> dilation, int64_t groups, int64_t location) {
  const Convolution conv = convolution_of(input, weight, output_size, stride, padding, dilation, groups);
  check(location >= 0 && location <= static_cast<int64_t>(Location::kSame), "location must be 0, 1, 2 or 3, got ",
        location);
  check_points(points);
  if (negative) check_negative(*negative, points);
  const Tensor list = torch::stable::contiguous(points);
  const Tensor flips = negative ? torch::stable::contiguous(*negative) : list;
  const int64_t count = list.numel();
  const auto* flat = static_cast<const int64_t*>(list.const_data_ptr());
  check_inside(flat, count, conv.images * conv.filters * conv.outputs());
  check(count == 0 || (input.numel() > 0 && weight.numel() > 0), "input and weight must not be empty, got shapes ",
        ShapeOf{input}, " and ", ShapeOf{weight});

  Tensor out = torch::stable::empty({count}, ScalarType::Long);
  dispatch_floating(input, "input", [&](auto type) {
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
