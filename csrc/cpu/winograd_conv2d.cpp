#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "checks.h"
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
constexpr int64_t kTilesOfThread = 24, kLargestWeights = int64_t{10} << 20;
// With larger weights, the threads share the places of this many bytes of tiles.
constexpr int64_t kSharedBytes = int64_t{8} << 20;
constexpr int64_t kLeastShared = 48;

// The points of the transforms are 0, +-kNear, +-kFar and infinity. With 1 and 2, the usual ones, errors are four times
// as large.
constexpr float kNear = 0.75f, kFar = 1.5f, kNear2 = kNear * kNear, kFar2 = kFar * kFar;

// The numbers of a panel, in vectors of a machine, and such a vector at any address, see `Vector`. Never passed by
// value: the ABI of that depends on the instruction set.
template <class Machine>
struct Panel {
  using Lanes __attribute__((vector_size(Machine::kBytes))) = float;
  struct __attribute__((packed, may_alias)) Anywhere {
    Lanes all;
  };
  static constexpr int kLanes = Machine::kBytes / 4, kVectors = kPanel / kLanes;
};

template <class Machine>
PYFAST_XAI_INLINE typename Panel<Machine>::Anywhere& vector(float* values) {
  return *reinterpret_cast<typename Panel<Machine>::Anywhere*>(values);
}
template <class Machine>
PYFAST_XAI_INLINE const typename Panel<Machine>::Anywhere& vector(const float* values) {
  return *reinterpret_cast<const typename Panel<Machine>::Anywhere*>(values);
}

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

// The transforms of some tiles, place by place: [kPlaces, tiles, channels] and [kPlaces, tiles, filters].
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

template <class Machine>
using Lanes = typename Panel<Machine>::Lanes;

// B^T d along one dimension.
template <class Machine>
PYFAST_XAI_INLINE void transform_window(const Lanes<Machine> (&d)[kWindow], Lanes<Machine> (&out)[kWindow]) {
  const Lanes<Machine> near_even = d[4] - kFar2 * d[2], near_odd = kNear * (d[3] - kFar2 * d[1]);
  const Lanes<Machine> far_even = d[4] - kNear2 * d[2], far_odd = kFar * (d[3] - kNear2 * d[1]);
  out[0] = kNear2 * kFar2 * d[0] - (kNear2 + kFar2) * d[2] + d[4];
  out[1] = near_even + near_odd;
  out[2] = near_even - near_odd;
  out[3] = far_even + far_odd;
  out[4] = far_even - far_odd;
  out[5] = kNear2 * kFar2 * d[1] - (kNear2 + kFar2) * d[3] + d[5];
}

// A^T m along one dimension.
template <class Machine>
PYFAST_XAI_INLINE void transform_product(const Lanes<Machine> (&m)[kWindow], Lanes<Machine> (&out)[kTile]) {
  const Lanes<Machine> near_even = m[1] + m[2], near_odd = kNear * (m[1] - m[2]);
  const Lanes<Machine> far_even = m[3] + m[4], far_odd = kFar * (m[3] - m[4]);
  out[0] = m[0] + near_even + far_even;
  out[1] = near_odd + far_odd;
  out[2] = kNear2 * near_even + kFar2 * far_even;
  out[3] = kNear2 * near_odd + kFar2 * far_odd + m[5];
}

template <class Machine>
PYFAST_XAI_INLINE void transform_windows_on(const Convolution3x3& conv, int64_t first, int64_t begin, int64_t end,
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
    for (int64_t c = 0; c < channels; c += Panel<Machine>::kLanes) {
      Lanes<Machine> half[kWindow][kWindow], line[kWindow], out[kWindow];
      for (int64_t x = 0; x < kWindow; ++x) {
        for (int64_t y = 0; y < kWindow; ++y) line[y] = vector<Machine>(pixels[y * kWindow + x] + c).all;
        transform_window<Machine>(line, out);
        for (int64_t y = 0; y < kWindow; ++y) half[y][x] = out[y];
      }
      float* to = scratch.windows + index * channels + c;
      for (int64_t y = 0; y < kWindow; ++y) {
        transform_window<Machine>(half[y], out);
        for (int64_t x = 0; x < kWindow; ++x)
          vector<Machine>(to + (y * kWindow + x) * scratch.window_step).all = out[x];
      }
    }
  }
}
PYFAST_XAI_ON_EACH_MACHINE(void, transform_windows,
                           (const Convolution3x3& conv, int64_t first, int64_t begin, int64_t end,
                            const Scratch& scratch),
                           (conv, first, begin, end, scratch))

template <class Machine>
PYFAST_XAI_INLINE void transform_products_on(const Convolution3x3& conv, int64_t first, int64_t begin, int64_t end,
                                             const Scratch& scratch) {
  const auto [channels, height, width] = conv.out;
  const Lanes<Machine> lower = Lanes<Machine>{} + conv.lower, upper = Lanes<Machine>{} + conv.upper;
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile(conv, first + index);
    const int64_t tall = std::min(kTile, height - tile.top), wide = std::min(kTile, width - tile.left);
    for (int64_t c = 0; c < channels; c += Panel<Machine>::kLanes) {
      Lanes<Machine> half[kTile][kWindow], line[kWindow], out[kTile];
      const float* from = scratch.products + index * channels + c;
      for (int64_t x = 0; x < kWindow; ++x) {
        for (int64_t y = 0; y < kWindow; ++y) {
          line[y] = vector<Machine>(from + (y * kWindow + x) * scratch.product_step).all;
        }
        transform_product<Machine>(line, out);
        for (int64_t y = 0; y < kTile; ++y) half[y][x] = out[y];
      }
      const Lanes<Machine> bias = conv.bias ? vector<Machine>(conv.bias + c).all : Lanes<Machine>{};
      for (int64_t y = 0; y < tall; ++y) {
        float* to = conv.output + ((tile.image * height + tile.top + y) * width + tile.left) * channels + c;
        transform_product<Machine>(half[y], out);
        for (int64_t x = 0; x < kTile; ++x) {
          if (x >= wide) break;
          Lanes<Machine> value = out[x] + bias;
          value = value < lower ? lower : value;
          vector<Machine>(to + x * channels).all = value > upper ? upper : value;
        }
      }
    }
  }
}
PYFAST_XAI_ON_EACH_MACHINE(void, transform_products,
                           (const Convolution3x3& conv, int64_t first, int64_t begin, int64_t end,
                            const Scratch& scratch),
                           (conv, first, begin, end, scratch))

// left [rows, depth] x panels [columns / kPanel, depth, kPanel] = out [rows, columns].
struct Product {
  const float *left, *panels;
  float* out;
  int64_t rows, depth, columns;
};

template <class Machine, int kRows, int kPanels>
PYFAST_XAI_INLINE void multiply_block(const Product& product, int64_t row, int64_t first) {
  constexpr int kLanes = Panel<Machine>::kLanes, kVectors = Panel<Machine>::kVectors;
  Lanes<Machine> sums[kRows][kPanels * kVectors] = {};
  const int64_t depth = product.depth;
  const float* left = product.left + row * depth;
  const float* right = product.panels + first * depth * kPanel;
  for (int64_t c = 0; c < depth; ++c) {
    Lanes<Machine> weights[kPanels * kVectors];
    for (int v = 0; v < kPanels * kVectors; ++v) {
      weights[v] = vector<Machine>(right + (v / kVectors * depth + c) * kPanel + v % kVectors * kLanes).all;
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kPanels * kVectors; ++v) sums[r][v] += left[r * depth + c] * weights[v];
    }
  }
  float* out = product.out + row * product.columns + first * kPanel;
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kPanels * kVectors; ++v)
      vector<Machine>(out + r * product.columns + v * kLanes).all = sums[r][v];
  }
}

// Blocks of `rows` rows, at most kRows, of which there are `count`.
template <class Machine, int kRows, int kPanels>
PYFAST_XAI_INLINE void multiply_rows(const Product& product, int64_t first, int64_t row, int64_t rows, int64_t count) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return multiply_rows<Machine, kRows - 1, kPanels>(product, first, row, rows, count);
  }
  for (int64_t i = 0; i < count; ++i) multiply_block<Machine, kRows, kPanels>(product, row + i * kRows, first);
}

// Multiplies all rows in blocks of nearly the same size, since small blocks use each loaded weight few times.
template <class Machine, int kRows, int kPanels>
PYFAST_XAI_INLINE void multiply_panels(const Product& product, int64_t first) {
  const int64_t blocks = (product.rows + kRows - 1) / kRows, rows = product.rows / blocks;
  const int64_t larger = product.rows % blocks;
  multiply_rows<Machine, kRows, kPanels>(product, first, 0, rows + 1, larger);
  multiply_rows<Machine, kRows, kPanels>(product, first, larger * (rows + 1), rows, blocks - larger);
}

// The number of sums that fit in the registers beside the weights and one factor.
template <class Machine>
struct Block;
template <>
struct Block<Avx512> {
  static constexpr int kRows = 12, kPanels = 2;
};
template <>
struct Block<Avx2> {
  static constexpr int kRows = 6, kPanels = 1;
};
template <>
struct Block<Neon> {
  [[maybe_unused]] static constexpr int kRows = 6, kPanels = 1;
};
template <>
struct Block<Sse2> {
  static constexpr int kRows = 2, kPanels = 1;
};

// The panels [begin, end) of a product.
template <class Machine>
PYFAST_XAI_INLINE void multiply_on(const Product& product, int64_t begin, int64_t end) {
  using Sums = Block<Machine>;
  int64_t first = begin;
  for (; first + Sums::kPanels <= end; first += Sums::kPanels) {
    multiply_panels<Machine, Sums::kRows, Sums::kPanels>(product, first);
  }
  for (; first < end; ++first) multiply_panels<Machine, Sums::kRows, 1>(product, first);
}
PYFAST_XAI_ON_EACH_MACHINE(void, multiply, (const Product& product, int64_t begin, int64_t end), (product, begin, end))

void multiply_place(const Convolution3x3& conv, const Scratch& scratch, int64_t tiles, int64_t place, int64_t begin,
                    int64_t end) {
  const auto channels = conv.in.channels, filters = conv.out.channels;
  const Product product{scratch.windows + place * scratch.window_step,
                        conv.weight + place * filters * channels,
                        scratch.products + place * scratch.product_step,
                        tiles,
                        channels,
                        filters};
  multiply(product, begin, end);
}

// Each thread takes tiles of its own, a few at a time.
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

// All threads work on the same tiles, so that each weight is read once for many of them.
void convolve_together(const Convolution3x3& conv) {
  const int64_t bytes_of_tile = kPlaces * (conv.in.channels + conv.out.channels) * sizeof(float);
  const int64_t at_once = std::min(conv.tiles, std::max(kLeastShared, kSharedBytes / bytes_of_tile));
  const int64_t panels = conv.out.channels / kPanel;
  const Scratch scratch(conv, at_once);
  for (int64_t first = 0; first < conv.tiles; first += at_once) {
    const int64_t count = std::min(at_once, conv.tiles - first);
    torch::stable::parallel_for(
        0, count, 1, [&](int64_t begin, int64_t end) { transform_windows(conv, first, begin, end, scratch); });
    torch::stable::parallel_for(0, kPlaces * panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t place = begin / panels; place * panels < end; ++place) {
        const int64_t start = place * panels;
        multiply_place(conv, scratch, count, place, std::max(begin - start, int64_t{0}), std::min(end - start, panels));
      }
    });
    torch::stable::parallel_for(
        0, count, 1, [&](int64_t begin, int64_t end) { transform_products(conv, first, begin, end, scratch); });
  }
}

Tensor winograd_conv2d(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias,
                       std::vector<int64_t> padding, double lower, double upper) {
  checks::winograd_conv2d(input, weight, bias, padding, lower, upper);
  const int64_t filters = weight.size(1) * kPanel;
  const int64_t height = input.size(2) + 2 * padding[0] - 2, width = input.size(3) + 2 * padding[1] - 2;

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
