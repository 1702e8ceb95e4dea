#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/layout.h"
#include "cpu/simd.h"

// Minimal filtering F(4x4, 3x3) in three steps. Windows of 6 x 6 pixels of the input are transformed; each of their 36
// places is then a product of matrices, [tiles, channels] x [channels, filters]; what comes of it is transformed to
// tiles of 4 x 4 pixels of the output.
namespace pyfast_xai {
namespace {

constexpr int64_t kTile = 4, kWindow = 6, kPlaces = kWindow * kWindow;
constexpr int64_t kPanel = 16;  // filters next to each other in a transformed weight

// Tiles that a thread takes through all steps while they are in its own cache, and the largest weights for which that
// is the way, since each round reads all of them.
constexpr int64_t kTilesOfThread = 16, kLargestWeights = int64_t{10} << 20;
// Otherwise the threads share the places of so many bytes of tiles.
constexpr int64_t kSharedBytes = int64_t{8} << 20;
constexpr int64_t kLeastShared = 48;

// The points of the transforms are 0, +-kNear, +-kFar and infinity. With 1 and 2, the usual ones, errors are four times
// as large.
constexpr float kNear = 0.75f, kFar = 1.5f, kNear2 = kNear * kNear, kFar2 = kFar * kFar;

// Numbers of kPanel channels, at any address. Never passed by value: the ABI of that depends on the instruction set.
typedef float Lanes __attribute__((vector_size(4 * kPanel), aligned(4), may_alias));

PYFAST_XAI_INLINE Lanes& panel(float* values) { return *reinterpret_cast<Lanes*>(values); }
PYFAST_XAI_INLINE const Lanes& panel(const float* values) { return *reinterpret_cast<const Lanes*>(values); }

struct Maps {
  int64_t channels, height, width;
};

struct Convolution3x3 {
  const float *input, *weight, *bias;
  float* output;
  Maps in, out;
  int64_t padding[2], rows, columns, tiles;
  float lower, upper;
  const float* zeros;  // a pixel outside the input
};

struct Tile {
  int64_t image, top, left;

  Tile(const Convolution3x3& conv, int64_t index)
      : image(index / (conv.rows * conv.columns)),
        top(index / conv.columns % conv.rows * kTile),
        left(index % conv.columns * kTile) {}
};

// Where the transforms of some tiles lie, place by place: [kPlaces, tiles, channels] and [kPlaces, tiles, filters].
// A few numbers between places keep them out of each other's cache lines.
struct Scratch {
  int64_t window_step, product_step;
  Tensor memory;
  float *windows, *products;

  Scratch(const Convolution3x3& conv, int64_t tiles)
      : window_step(tiles * conv.in.channels + kPanel),
        product_step(tiles * conv.out.channels + kPanel),
        memory(torch::stable::empty({kPlaces * (window_step + product_step)}, ScalarType::Float)),
        windows(static_cast<float*>(memory.mutable_data_ptr())),
        products(windows + kPlaces * window_step) {}
};

// B^T d along one dimension, whose numbers are `step` apart.
PYFAST_XAI_INLINE void transform_window(const Lanes* d, Lanes* out, int64_t step) {
  const Lanes &d0 = d[0], &d1 = d[step], &d2 = d[2 * step], &d3 = d[3 * step], &d4 = d[4 * step], &d5 = d[5 * step];
  const Lanes near_even = d4 - kFar2 * d2, near_odd = kNear * (d3 - kFar2 * d1);
  const Lanes far_even = d4 - kNear2 * d2, far_odd = kFar * (d3 - kNear2 * d1);
  out[0] = kNear2 * kFar2 * d0 - (kNear2 + kFar2) * d2 + d4;
  out[step] = near_even + near_odd;
  out[2 * step] = near_even - near_odd;
  out[3 * step] = far_even + far_odd;
  out[4 * step] = far_even - far_odd;
  out[5 * step] = kNear2 * kFar2 * d1 - (kNear2 + kFar2) * d3 + d5;
}

// A^T m along one dimension.
PYFAST_XAI_INLINE void transform_product(const Lanes* m, Lanes* out, int64_t step) {
  const Lanes near_even = m[step] + m[2 * step], near_odd = kNear * (m[step] - m[2 * step]);
  const Lanes far_even = m[3 * step] + m[4 * step], far_odd = kFar * (m[3 * step] - m[4 * step]);
  out[0] = m[0] + near_even + far_even;
  out[step] = near_odd + far_odd;
  out[2 * step] = kNear2 * near_even + kFar2 * far_even;
  out[3 * step] = kNear2 * near_odd + kFar2 * far_odd + m[5 * step];
}

PYFAST_XAI_CLONES void transform_windows(const Convolution3x3& conv, int64_t first, int64_t begin, int64_t end,
                                         const Scratch& scratch) {
  const auto [channels, height, width] = conv.in;
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile(conv, first + index);
    const float* pixels[kPlaces];
    for (int64_t i = 0; i < kPlaces; ++i) {
      const int64_t y = tile.top - conv.padding[0] + i / kWindow, x = tile.left - conv.padding[1] + i % kWindow;
      const bool inside = y >= 0 && y < height && x >= 0 && x < width;
      pixels[i] = inside ? conv.input + ((tile.image * height + y) * width + x) * channels : conv.zeros;
    }
    for (int64_t c = 0; c < channels; c += kPanel) {
      Lanes window[kPlaces], half[kPlaces];
      for (int64_t i = 0; i < kPlaces; ++i) window[i] = panel(pixels[i] + c);
      for (int64_t x = 0; x < kWindow; ++x) transform_window(window + x, half + x, kWindow);
      for (int64_t y = 0; y < kWindow; ++y) transform_window(half + y * kWindow, window + y * kWindow, 1);
      float* to = scratch.windows + index * channels + c;
      for (int64_t i = 0; i < kPlaces; ++i) panel(to + i * scratch.window_step) = window[i];
    }
  }
}

PYFAST_XAI_CLONES void transform_products(const Convolution3x3& conv, int64_t first, int64_t begin, int64_t end,
                                          const Scratch& scratch) {
  const auto [channels, height, width] = conv.out;
  const Lanes lower = Lanes{} + conv.lower, upper = Lanes{} + conv.upper;
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile(conv, first + index);
    const int64_t tall = std::min(kTile, height - tile.top), wide = std::min(kTile, width - tile.left);
    for (int64_t c = 0; c < channels; c += kPanel) {
      Lanes product[kPlaces], half[kTile * kWindow], pixels[kTile * kWindow];
      const float* from = scratch.products + index * channels + c;
      for (int64_t i = 0; i < kPlaces; ++i) product[i] = panel(from + i * scratch.product_step);
      for (int64_t x = 0; x < kWindow; ++x) transform_product(product + x, half + x, kWindow);
      for (int64_t y = 0; y < kTile; ++y) transform_product(half + y * kWindow, pixels + y * kWindow, 1);
      const Lanes bias = conv.bias ? panel(conv.bias + c) : Lanes{};
      for (int64_t y = 0; y < tall; ++y) {
        float* to = conv.output + ((tile.image * height + tile.top + y) * width + tile.left) * channels + c;
        for (int64_t x = 0; x < wide; ++x) {
          Lanes value = pixels[y * kWindow + x] + bias;
          value = value < lower ? lower : value;
          panel(to + x * channels) = value > upper ? upper : value;
        }
      }
    }
  }
}

// left [rows, depth] x panels [columns / kPanel, depth, kPanel] = out [rows, columns].
struct Product {
  const float *left, *panels;
  float* out;
  int64_t rows, depth, columns;
};

template <int kRows, int kPanels>
PYFAST_XAI_INLINE void multiply_block(const Product& product, int64_t row, int64_t first) {
  Lanes sums[kRows][kPanels] = {};
  const int64_t depth = product.depth;
  const float* left = product.left + row * depth;
  const float* right = product.panels + first * depth * kPanel;
  for (int64_t c = 0; c < depth; ++c) {
    for (int p = 0; p < kPanels; ++p) {
      const Lanes& weights = panel(right + (p * depth + c) * kPanel);
      for (int r = 0; r < kRows; ++r) sums[r][p] += left[r * depth + c] * weights;
    }
  }
  float* out = product.out + row * product.columns + first * kPanel;
  for (int r = 0; r < kRows; ++r) {
    for (int p = 0; p < kPanels; ++p) panel(out + r * product.columns + p * kPanel) = sums[r][p];
  }
}

template <int kRows, int kPanels>
PYFAST_XAI_INLINE void multiply_rows(const Product& product, int64_t first) {
  int64_t row = 0;
  for (; row + kRows <= product.rows; row += kRows) multiply_block<kRows, kPanels>(product, row, first);
  for (; row + 4 <= product.rows; row += 4) multiply_block<4, kPanels>(product, row, first);
  for (; row < product.rows; ++row) multiply_block<1, kPanels>(product, row, first);
}

// As many sums as fit the registers.
template <int kRows, int kPanels>
PYFAST_XAI_INLINE void multiply_all(const Product& product, int64_t begin, int64_t end) {
  int64_t first = begin;
  for (; first + kPanels <= end; first += kPanels) multiply_rows<kRows, kPanels>(product, first);
  for (; first < end; ++first) multiply_rows<kRows, 1>(product, first);
}

// The panels [begin, end) of a product.
#ifdef PYFAST_XAI_TARGETS
__attribute__((target("arch=x86-64-v4"))) void multiply(const Product& product, int64_t begin, int64_t end) {
  multiply_all<12, 2>(product, begin, end);
}
__attribute__((target("arch=x86-64-v3"))) void multiply(const Product& product, int64_t begin, int64_t end) {
  multiply_all<6, 1>(product, begin, end);
}
__attribute__((target("default")))
#endif
void multiply(const Product& product, int64_t begin, int64_t end) {
  multiply_all<2, 1>(product, begin, end);
}

void multiply_place(const Convolution3x3& conv, const Scratch& scratch, int64_t tiles, int64_t place, int64_t begin,
                    int64_t end) {
  const auto channels = conv.in.channels, filters = conv.out.channels;
  const Product product{scratch.windows + place * scratch.window_step, conv.weight + place * filters * channels,
                        scratch.products + place * scratch.product_step, tiles, channels, filters};
  multiply(product, begin, end);
}

// Each thread its own tiles, a few at a time.
void convolve_apart(const Convolution3x3& conv) {
  const int64_t rounds = (conv.tiles + kTilesOfThread - 1) / kTilesOfThread;
  torch::stable::parallel_for(0, rounds, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(conv, kTilesOfThread);
    for (int64_t round = begin; round < end; ++round) {
      const int64_t first = round * kTilesOfThread, count = std::min(kTilesOfThread, conv.tiles - first);
      transform_windows(conv, first, 0, count, scratch);
      for (int64_t place = 0; place < kPlaces; ++place) {
        multiply_place(conv, scratch, count, place, 0, conv.out.channels / kPanel);
      }
      transform_products(conv, first, 0, count, scratch);
    }
  });
}

// All threads the same tiles, so that each weight is read once for many of them.
void convolve_together(const Convolution3x3& conv) {
  const int64_t bytes_of_tile = kPlaces * (conv.in.channels + conv.out.channels) * sizeof(float);
  const int64_t at_once = std::min(conv.tiles, std::max(kLeastShared, kSharedBytes / bytes_of_tile));
  const int64_t panels = conv.out.channels / kPanel;
  const Scratch scratch(conv, at_once);
  for (int64_t first = 0; first < conv.tiles; first += at_once) {
    const int64_t count = std::min(at_once, conv.tiles - first);
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      transform_windows(conv, first, begin, end, scratch);
    });
    torch::stable::parallel_for(0, kPlaces * panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t place = begin / panels; place * panels < end; ++place) {
        const int64_t start = place * panels;
        multiply_place(conv, scratch, count, place, std::max(begin - start, int64_t{0}), std::min(end - start, panels));
      }
    });
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      transform_products(conv, first, begin, end, scratch);
    });
  }
}

Tensor winograd_conv2d(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias,
                       std::vector<int64_t> padding, double lower, double upper) {
  check_dtype(input, "input", ScalarType::Float);
  check(input.dim() == 4 && input.size(1) % kPanel == 0, "input must have shape [N, I, H, W] with I a multiple of ",
        kPanel, ", got ", ShapeOf{input});
  check(Layout(input).pixels, "input must be channels_last, got another memory format");
  check_dtype(weight, "weight", ScalarType::Float);
  check(weight.dim() == 4 && weight.size(0) == kPlaces && weight.size(2) == input.size(1) && weight.size(3) == kPanel,
        "weight must have shape [", kPlaces, ", O / ", kPanel, ", ", input.size(1), ", ", kPanel, "], got ",
        ShapeOf{weight});
  check(weight.is_contiguous(), "weight must be contiguous, got another memory order");
  const int64_t filters = weight.size(1) * kPanel;
  if (bias) {
    check_dtype(*bias, "bias", ScalarType::Float);
    check(bias->dim() == 1 && bias->size(0) == filters, "bias must have shape [", filters, "], got ", ShapeOf{*bias});
  }
  check(padding.size() == 2 && std::min(padding[0], padding[1]) >= 0, "padding must be 2 numbers of at least 0, got ",
        Listed<std::vector<int64_t>>{padding});
  const int64_t height = input.size(2) + 2 * padding[0] - 2, width = input.size(3) + 2 * padding[1] - 2;
  check(height > 0 && width > 0, "input must be at least 3 x 3 with its padding, got ", ShapeOf{input}, " padded by ",
        Listed<std::vector<int64_t>>{padding});
  check(lower <= upper, "lower must be at most upper, ", upper, ", got ", lower);

  Tensor output = torch::stable::empty({input.size(0), filters, height, width}, ScalarType::Float, std::nullopt,
                                       std::nullopt, std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
  const std::vector<float> zeros(input.size(1), 0.0f);
  const Tensor shift = bias ? torch::stable::contiguous(*bias) : weight;
  Convolution3x3 conv{};
  conv.input = static_cast<const float*>(input.const_data_ptr());
  conv.weight = static_cast<const float*>(weight.const_data_ptr());
  conv.bias = bias ? static_cast<const float*>(shift.const_data_ptr()) : nullptr;
  conv.output = static_cast<float*>(output.mutable_data_ptr());
  conv.in = {input.size(1), input.size(2), input.size(3)};
  conv.out = {filters, height, width};
  conv.padding[0] = padding[0], conv.padding[1] = padding[1];
  conv.rows = (height + kTile - 1) / kTile, conv.columns = (width + kTile - 1) / kTile;
  conv.tiles = input.size(0) * conv.rows * conv.columns;
  conv.lower = static_cast<float>(lower), conv.upper = static_cast<float>(upper);
  conv.zeros = zeros.data();

  const int64_t threads = torch::stable::get_num_threads();
  const bool few = conv.tiles < 2 * threads * kTilesOfThread;
  const int64_t bytes = kPlaces * filters * conv.in.channels * static_cast<int64_t>(sizeof(float));
  few || bytes > kLargestWeights ? convolve_together(conv) : convolve_apart(conv);
  return output;
}

}  // namespace
}  // namespace pyfast_xai

STABLE_TORCH_LIBRARY_IMPL(pyfast_xai, CPU, m) { m.impl("winograd_conv2d", TORCH_BOX(&pyfast_xai::winograd_conv2d)); }
