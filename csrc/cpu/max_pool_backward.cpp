#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "cpu/max_pool.h"

namespace pyfast_xai {
namespace {

constexpr int64_t kLanes = 64;  // channels of a task

// The gradient of some lanes of one image: cleared, then every window adds to the element that won it, in the order
// of the windows, as autograd adds them.
template <class T>
void scatter_lanes(const T* grad, const uint8_t* offsets, const Pool& pool, int64_t lane, int64_t lanes, T* out) {
  for (int64_t pixel = 0; pixel < pool.input[0] * pool.input[1]; ++pixel) {
    std::fill_n(out + pixel * pool.lanes + lane, lanes, T(0));
  }
  std::vector<int64_t> moves(pool.kernel[0] * pool.kernel[1]);
  for (int64_t k = 0; k < static_cast<int64_t>(moves.size()); ++k) {
    const int64_t y = k / pool.kernel[1] * pool.dilation[0], x = k % pool.kernel[1] * pool.dilation[1];
    moves[k] = (y * pool.input[1] + x) * pool.lanes;
  }
  for (int64_t row = 0; row < pool.output[0]; ++row) {
    for (int64_t column = 0; column < pool.output[1]; ++column) {
      const int64_t at = (row * pool.output[1] + column) * pool.lanes + lane;
      const int64_t y = row * pool.stride[0] - pool.padding[0], x = column * pool.stride[1] - pool.padding[1];
      const int64_t corner = (y * pool.input[1] + x) * pool.lanes + lane;
      for (int64_t j = 0; j < lanes; ++j) {
        T& sum = out[corner + moves[offsets[at + j]] + j];
        sum = static_cast<T>(sum + grad[at + j]);
      }
    }
  }
}

void max_pool_backward(const Tensor& grad, const Tensor& offsets, std::vector<int64_t> kernel,
                       std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                       const Tensor& out) {
  checks::max_pool_backward(grad, offsets, kernel, stride, padding, dilation, out);
  const bool pixels = pixels_follow(out, grad, offsets);
  if (out.numel() == 0) return;
  const Pool pool = pool_of(out, out, grad, kernel, stride, padding, dilation, pixels);
  dispatch_floating(grad, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto* from = static_cast<const T*>(grad.const_data_ptr());
    const auto* places = static_cast<const uint8_t*>(offsets.const_data_ptr());
    auto* to = static_cast<T*>(out.mutable_data_ptr());
    // The offsets of an image serve all its targets.
    const int64_t period = pool.images / (grad.size(0) / offsets.size(0));
    const int64_t blocks = (pool.lanes + kLanes - 1) / kLanes;
    torch::stable::parallel_for(0, pool.images * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / blocks, lane = task % blocks * kLanes;
        scatter_lanes(from + image * pool.output_size(), places + image % period * pool.output_size(), pool, lane,
                      std::min(kLanes, pool.lanes - lane), to + image * pool.input_size());
      }
    });
  });
}

}  // namespace
}  // namespace pyfast_xai

STABLE_TORCH_LIBRARY_IMPL(pyfast_xai, CPU, m) {
  m.impl("max_pool_backward", TORCH_BOX(&pyfast_xai::max_pool_backward));
}
