#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "checks.h"
#include "cpu/simd.h"
#include "dispatch.h"

namespace pyfast_xai {
namespace {

constexpr int64_t kTile = 256;  // pixels whose sums stay in the first cache

// The places of the pixels of a tile in a plane: one after the other, or at offsets.
struct Pixels {
  int64_t count;
  const int64_t* offsets;  // null if the pixels follow each other from the start of the plane
};

// sums[p] = the sum over the channels, in their order.
template <class T>
PYFAST_XAI_INLINE void sum_channels(const T* plane, int64_t channels, int64_t stride, const Pixels& pixels,
                                    Accumulated<T>* sums) {
  using A = Accumulated<T>;
  std::fill_n(sums, pixels.count, A(0));
  for (int64_t c = 0; c < channels; ++c, plane += stride) {
    if (pixels.offsets) {
      for (int64_t p = 0; p < pixels.count; ++p) sums[p] += static_cast<A>(plane[pixels.offsets[p]]);
    } else {
      for (int64_t p = 0; p < pixels.count; ++p) sums[p] += static_cast<A>(plane[p]);
    }
  }
}

template <class A>
PYFAST_XAI_INLINE void keep_larger(const A* sums, int64_t index, int64_t count, A* best, int64_t* winner) {
  for (int64_t p = 0; p < count; ++p) {
    const bool wins = sums[p] > best[p];
    best[p] = wins ? sums[p] : best[p];
    winner[p] = wins ? index : winner[p];
  }
}

template <class Machine, class T>
PYFAST_XAI_INLINE void fold_on(const T* plane, int64_t channels, int64_t stride, const Pixels& pixels, int64_t index,
                               Accumulated<T>* best, int64_t* winner) {
  Accumulated<T> sums[kTile];
  sum_channels(plane, channels, stride, pixels, sums);
  keep_larger(sums, index, pixels.count, best, winner);
}

PYFAST_XAI_ON_EACH_MACHINE(void, fold,
                           (const float* plane, int64_t channels, int64_t stride, const Pixels& pixels, int64_t index,
                            float* best, int64_t* winner),
                           (plane, channels, stride, pixels, index, best, winner))
PYFAST_XAI_ON_EACH_MACHINE(void, fold,
                           (const double* plane, int64_t channels, int64_t stride, const Pixels& pixels, int64_t index,
                            double* best, int64_t* winner),
                           (plane, channels, stride, pixels, index, best, winner))
PYFAST_XAI_ON_EACH_MACHINE(void, fold,
                           (const Half* plane, int64_t channels, int64_t stride, const Pixels& pixels, int64_t index,
                            float* best, int64_t* winner),
                           (plane, channels, stride, pixels, index, best, winner))
PYFAST_XAI_ON_EACH_MACHINE(void, fold,
                           (const BFloat16* plane, int64_t channels, int64_t stride, const Pixels& pixels,
                            int64_t index, float* best, int64_t* winner),
                           (plane, channels, stride, pixels, index, best, winner))

template <class T>
void fold_all(const Tensor& responses, const int64_t* classes, Accumulated<T>* best, int64_t* winner) {
  const int64_t count = responses.size(0), images = responses.size(1), channels = responses.size(2);
  const int64_t width = responses.size(4), area = responses.size(3) * width;
  const int64_t down = responses.stride(3), right = responses.stride(4);
  const bool rows_follow = (right == 1 || width == 1) && (down == width || responses.size(3) == 1);
  // A channels-last tile is narrow: its pixels are far apart, and a cache line of each is read channel by channel.
  const int64_t tile = rows_follow ? kTile : 32, tiles = (area + tile - 1) / tile;
  const auto* data = static_cast<const T*>(responses.const_data_ptr());
  torch::stable::parallel_for(0, images * tiles, 1, [&](int64_t begin, int64_t end) {
    int64_t offsets[kTile];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / tiles, first = task % tiles * tile, size = std::min(tile, area - first);
      for (int64_t p = 0; !rows_follow && p < size; ++p) {
        offsets[p] = (first + p) / width * down + (first + p) % width * right;
      }
      const Pixels pixels{size, rows_follow ? nullptr : offsets};
      const int64_t at = image * area + first;
      for (int64_t k = 0; k < count; ++k) {
        const int64_t index = classes[k * images + image];
        if (index < 0) continue;
        const T* plane = data + k * responses.stride(0) + image * responses.stride(1) + (rows_follow ? first : 0);
        fold(plane, channels, responses.stride(2), pixels, index, best + at, winner + at);
      }
    }
  });
}

void response_argmax(const Tensor& responses, const Tensor& classes, const Tensor& best, const Tensor& winner) {
  checks::response_argmax(responses, classes, best, winner);
  dispatch_floating(responses, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulated<T>;
    const Tensor list = torch::stable::contiguous(classes);
    fold_all<T>(responses, static_cast<const int64_t*>(list.const_data_ptr()), static_cast<A*>(best.mutable_data_ptr()),
                static_cast<int64_t*>(winner.mutable_data_ptr()));
  });
}

}  // namespace
}  // namespace pyfast_xai

STABLE_TORCH_LIBRARY_IMPL(pyfast_xai, CPU, m) { m.impl("response_argmax", TORCH_BOX(&pyfast_xai::response_argmax)); }
