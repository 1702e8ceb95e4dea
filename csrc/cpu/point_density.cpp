#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <vector>

#include "checks.h"
#include "cpu/simd.h"

namespace pyfast_xai {
namespace {

// The smallest value of a Gaussian of height one that counts. A product of two is not denormal, which would be slow.
constexpr float kNegligible = 1e-18f;

// out = sum of weights[i] * rows[i], each row `width` numbers.
template <class Machine>
PYFAST_XAI_INLINE void blend_rows_on(const float* const* rows, const float* weights, int64_t count, int64_t width,
                                     float* out) {
  constexpr int64_t kLanes = Vector<float, Machine>::kLanes, kBlock = 32, kVectors = kBlock / kLanes;
  int64_t x = 0;
  for (; x + kBlock <= width; x += kBlock) {
    typename Vector<float, Machine>::type sums[kVectors] = {};
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t v = 0; v < kVectors; ++v) sums[v] += weights[i] * lanes<Machine>(rows[i] + x + v * kLanes)->all;
    }
    for (int64_t v = 0; v < kVectors; ++v) lanes<Machine>(out + x + v * kLanes)->all = sums[v];
  }
  for (; x < width; ++x) {
    float sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += weights[i] * rows[i][x];
    out[x] = sum;
  }
}
PYFAST_XAI_ON_EACH_MACHINE(void, blend_rows,
                           (const float* const* rows, const float* weights, int64_t count, int64_t width, float* out),
                           (rows, weights, count, width, out))

// The Gaussian at distances -(size - 1) .. size - 1.
std::vector<float> gaussian(int64_t size, double sigma) {
  std::vector<float> table(2 * size - 1);
  for (int64_t i = 0; i < 2 * size - 1; ++i) {
    const double distance = static_cast<double>(i - (size - 1)) / sigma;
    const double value = std::exp(-0.5 * distance * distance);
    table[i] = value < kNegligible ? 0 : static_cast<float>(value);
  }
  return table;
}

// Points by image row: the columns of row r are columns[first[r]] .. columns[first[r + 1] - 1].
struct Rows {
  std::vector<int64_t> first, columns;

  Rows(const int64_t* points, int64_t count, int64_t rows, int64_t width) : first(rows + 1, 0), columns(count) {
    for (int64_t i = 0; i < count; ++i) ++first[points[i] / width + 1];
    for (int64_t r = 0; r < rows; ++r) first[r + 1] += first[r];
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    for (int64_t i = 0; i < count; ++i) columns[next[points[i] / width]++] = points[i] % width;
  }
};

struct Image {
  int64_t height, width;
  std::vector<float> vertical, horizontal;
};

// The points of one row, blurred along it. Points that coincide are blurred once.
void blur_row(const Image& image, const int64_t* columns, int64_t count, float* out) {
  std::vector<float> occurrences(image.width, 0), weights;
  std::vector<const float*> shifted;
  for (int64_t i = 0; i < count; ++i) occurrences[columns[i]] += 1;
  for (int64_t x = 0; x < image.width; ++x) {
    if (occurrences[x] == 0) continue;
    weights.push_back(occurrences[x]);
    shifted.push_back(image.horizontal.data() + image.width - 1 - x);
  }
  blend_rows(shifted.data(), weights.data(), static_cast<int64_t>(weights.size()), image.width, out);
}

// Spreading the blurred rows over the others is a product of matrices, the larger part of the work, which BLAS does.
Tensor density_of_image(const Image& image, const Rows& points, int64_t first_row) {
  std::vector<int64_t> filled;
  for (int64_t y = 0; y < image.height; ++y) {
    if (points.first[first_row + y + 1] > points.first[first_row + y]) filled.push_back(y);
  }
  const auto count = static_cast<int64_t>(filled.size());
  Tensor blurred = torch::stable::empty({count, image.width}, ScalarType::Float);
  Tensor spread = torch::stable::empty({image.height, count}, ScalarType::Float);
  auto* rows = static_cast<float*>(blurred.mutable_data_ptr());
  auto* weights = static_cast<float*>(spread.mutable_data_ptr());
  torch::stable::parallel_for(0, count, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = points.first[first_row + filled[i]];
      blur_row(image, points.columns.data() + at, points.first[first_row + filled[i] + 1] - at, rows + i * image.width);
    }
  });
  for (int64_t y = 0; y < image.height; ++y) {
    for (int64_t i = 0; i < count; ++i) weights[y * count + i] = image.vertical[image.height - 1 + y - filled[i]];
  }
  return torch::stable::matmul(spread, blurred);
}

Tensor point_density(const Tensor& points, int64_t images, int64_t height, int64_t width, double sigma) {
  checks::point_density(points, images, height, width, sigma);
  const Tensor list = torch::stable::contiguous(points);
  const auto* flat = static_cast<const int64_t*>(list.const_data_ptr());
  Tensor out = torch::stable::empty({images, height, width}, ScalarType::Float);
  if (out.numel() == 0) return out;
  const Image image{height, width, gaussian(height, sigma), gaussian(width, sigma)};
  const Rows rows(flat, list.numel(), images * height, width);
  for (int64_t n = 0; n < images; ++n) {
    Tensor own = torch::stable::select(out, 0, n);
    torch::stable::copy_(own, density_of_image(image, rows, n * height));
  }
  return out;
}

}  // namespace
}  // namespace pyfast_xai

STABLE_TORCH_LIBRARY_IMPL(pyfast_xai, CPU, m) { m.impl("point_density", TORCH_BOX(&pyfast_xai::point_density)); }
