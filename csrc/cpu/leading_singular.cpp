#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/dense.h"
#include "dispatch.h"

namespace pyfast_xai {
namespace {

enum class Method : int64_t { kAuto = 0, kGram = 1, kSubspace = 2 };

constexpr int64_t kOversample = 8;
constexpr int64_t kGramLimit = 1024;     // small side above which the Gram matrix costs more than the iteration
constexpr int64_t kDirect = 24;          // matrices this small are diagonalised whole
constexpr int64_t kIterationLimit = 64;  // of the eigenvector iteration, before the whole matrix is diagonalised
constexpr int kRefinements = 3;

// A matrix [small, large] inside a batch, possibly the transpose of what the caller gave.
template <class T>
struct Matrix {
  const T* data;
  int64_t small, large;
  int64_t small_stride, large_stride;

  // A^T x for every x of a basis of the small space.
  Basis to_large(const Basis& x) const {
    Basis y(x.count, large);
    if (large_stride == 1) {
      for (int64_t i = 0; i < small; ++i) {
        for (int64_t v = 0; v < x.count; ++v) add_scaled(x[v][i], data + i * small_stride, y[v], large);
      }
    } else {
      for (int64_t j = 0; j < large; ++j) {
        for (int64_t v = 0; v < x.count; ++v) y[v][j] = dot(data + j * large_stride, x[v], small);
      }
    }
    return y;
  }

  Basis to_small(const Basis& y) const {
    return Matrix{data, large, small, large_stride, small_stride}.to_large(y);
  }
};

struct Triplets {
  Basis small, large;
  std::vector<double> singular, residual;
};

// The best triplets within the span of `x`, an orthonormal basis of the small space: A^T x is rotated until its
// vectors are orthogonal, and one product with the matrix more says how far they are from singular vectors. While
// that is more than `tolerance`, the product is the better basis to start again from.
template <class T>
Triplets refine(const Matrix<T>& matrix, Basis x, int64_t k, double tolerance, int rounds) {
  for (int round = 1;; ++round) {
    Basis y = matrix.to_large(x);
    const Eigen eigen = symmetric_eigen(inner_products(y, y), x.count);
    x = rotated(x, eigen.vectors);
    y = rotated(y, eigen.vectors);
    std::vector<double> singular(x.count);
    for (int64_t v = 0; v < x.count; ++v) singular[v] = std::sqrt(dot(y[v], y[v], y.length));
    orthonormalise(y);

    Basis product = matrix.to_small(y);
    const double scale = std::max(singular[0], std::numeric_limits<double>::min());
    std::vector<double> residual(k);
    for (int64_t v = 0; v < k; ++v) {
      std::vector<double> error(product[v], product[v] + product.length);
      add_scaled(-singular[v], x[v], error.data(), product.length);
      residual[v] = std::sqrt(dot(error.data(), error.data(), product.length)) / scale;
    }
    if (round >= rounds || *std::max_element(residual.begin(), residual.end()) <= tolerance) {
      return {std::move(x), std::move(y), std::move(singular), std::move(residual)};
    }
    x = std::move(product);
    orthonormalise(x);
  }
}

// Leading `k` eigenvectors of a positive semidefinite matrix [m, m] by block iteration; false where they have not
// converged to `tolerance` (relative to the largest eigenvalue), which takes eigenvalues close to each other.
bool leading_eigenvectors(const double* gram, int64_t m, int64_t k, double tolerance, Basis& result) {
  const int64_t block = std::min(m, (k + kOversample + 7) / 8 * 8);
  if (m <= kDirect) {
    const Eigen eigen = symmetric_eigen({gram, gram + m * m}, m);
    for (int64_t v = 0; v < k; ++v) {
      for (int64_t i = 0; i < m; ++i) result[v][i] = eigen.vectors[i * m + v];
    }
    return true;
  }
  if (2 * block > m) return false;
  Basis x = random_basis(block, m, 0);
  for (int64_t iteration = 0; iteration < kIterationLimit; ++iteration) {
    orthonormalise(x);
    Basis product = multiply_symmetric(gram, x);
    const Eigen eigen = symmetric_eigen(inner_products(x, product), block);
    x = rotated(x, eigen.vectors);
    product = rotated(product, eigen.vectors);
    double worst = 0;
    for (int64_t v = 0; v < k; ++v) {
      std::vector<double> error(product[v], product[v] + m);
      add_scaled(-eigen.values[v], x[v], error.data(), m);
      worst = std::max(worst, std::sqrt(dot(error.data(), error.data(), m)));
    }
    if (worst <= tolerance * eigen.values[0]) {
      std::copy_n(x.values.data(), k * m, result.values.data());
      return true;
    }
    x = std::move(product);
  }
  return false;
}

// All eigenvectors through LAPACK; slow and sure.
void all_eigenvectors(const double* gram, int64_t m, int64_t k, Basis& result) {
  Tensor matrix = torch::stable::empty({m, m}, ScalarType::Double);
  std::copy_n(gram, m * m, static_cast<double*>(matrix.mutable_data_ptr()));
  std::array<StableIValue, 2> stack{torch::stable::detail::from(matrix),
                                    torch::stable::detail::from(std::string("L"))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linalg_eigh", "", stack.data(), TORCH_ABI_VERSION));
  const auto values = torch::stable::detail::to<Tensor>(stack[0]);
  const auto vectors = torch::stable::contiguous(torch::stable::detail::to<Tensor>(stack[1]));
  const auto* columns = static_cast<const double*>(vectors.const_data_ptr());
  for (int64_t v = 0; v < k; ++v) {  // LAPACK's order is rising
    for (int64_t i = 0; i < m; ++i) result[v][i] = columns[i * m + m - 1 - v];
  }
}

template <class T>
std::vector<double> widened(const T* from, int64_t count) {
  return {from, from + count};
}

// Whether the products of float32 entries stayed within range and away from denormal numbers.
bool well_scaled(const Tensor& grams) {
  const int64_t batch = grams.size(0), m = grams.size(1);
  const auto* values = static_cast<const float*>(grams.const_data_ptr());
  for (int64_t b = 0; b < batch; ++b) {
    float trace = 0;
    for (int64_t i = 0; i < m; ++i) trace += values[(b * m + i) * m + i];
    if (!(trace > 1e-24f && trace < 1e36f)) return false;
  }
  return true;
}

// Singular values below about a thousandth of the largest drown in the rounding of a float32 Gram matrix.
bool accurate(const Triplets& triplets) {
  return *std::max_element(triplets.residual.begin(), triplets.residual.end()) <= 1e-6;
}

// A view [B, small, large] of the batch, one of the last two strides being one.
struct Batch {
  Tensor tensor;
  bool transposed;  // small are the columns of what the caller gave

  template <class T>
  Matrix<T> matrix(int64_t b) const {
    return {static_cast<const T*>(tensor.const_data_ptr()) + b * tensor.stride(0), tensor.size(1), tensor.size(2),
            tensor.stride(1), tensor.stride(2)};
  }
};

template <class T>
std::vector<Triplets> by_gram(const Batch& batch, int64_t k, const Tensor& grams) {
  const int64_t count = batch.tensor.size(0), m = batch.tensor.size(1);
  const bool wide = grams.scalar_type() == ScalarType::Double;
  // The Gram matrix of float32 entries is no better than this itself; the refinement makes up for it.
  const double tolerance = wide ? 1e-13 : 1e-10;
  std::vector<std::vector<double>> unfinished(count);
  std::vector<Triplets> all(count, Triplets{Basis(0, 0), Basis(0, 0), {}, {}});
  const auto finish = [&](int64_t b, Basis start) {
    all[b] = refine(batch.matrix<T>(b), std::move(start), k, std::is_same_v<T, double> ? 1e-13 : 1e-7, kRefinements);
  };
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const void* data = grams.const_data_ptr();
      std::vector<double> gram = wide ? widened(static_cast<const double*>(data) + b * m * m, m * m)
                                      : widened(static_cast<const float*>(data) + b * m * m, m * m);
      Basis start(k, m);
      if (leading_eigenvectors(gram.data(), m, k, tolerance, start)) {
        finish(b, std::move(start));
      } else {
        unfinished[b] = std::move(gram);
      }
    }
  });
  for (int64_t b = 0; b < count; ++b) {
    if (unfinished[b].empty()) continue;
    Basis start(k, m);
    all_eigenvectors(unfinished[b].data(), m, k, start);
    finish(b, std::move(start));
  }
  return all;
}

Tensor grams_of(const Tensor& matrices) {
  return torch::stable::contiguous(torch::stable::matmul(matrices, torch::stable::transpose(matrices, 1, 2)));
}

template <class T>
std::vector<Triplets> gram_route(const Batch& batch, int64_t k) {
  const Tensor grams = grams_of(batch.tensor);
  if constexpr (std::is_same_v<T, double>) {
    return by_gram<T>(batch, k, grams);
  } else {
    if (well_scaled(grams)) {
      std::vector<Triplets> all = by_gram<T>(batch, k, grams);
      if (std::all_of(all.begin(), all.end(), accurate)) return all;
    }
    return by_gram<T>(batch, k, grams_of(torch::stable::to(batch.tensor, ScalarType::Double)));
  }
}

// Orthonormal bases [B, rows, width], one vector a column: Gram-Schmidt in double on each.
template <class T>
Tensor orthonormal_columns(const Tensor& columns) {
  const int64_t count = columns.size(0), rows = columns.size(1), width = columns.size(2);
  Tensor out = torch::stable::empty({count, rows, width}, columns.scalar_type());
  const Tensor packed = torch::stable::contiguous(columns);
  const T* from = static_cast<const T*>(packed.const_data_ptr());
  T* to = static_cast<T*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      Basis basis(width, rows);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t v = 0; v < width; ++v) basis[v][i] = from[(b * rows + i) * width + v];
      }
      orthonormalise(basis);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t v = 0; v < width; ++v) to[(b * rows + i) * width + v] = static_cast<T>(basis[v][i]);
      }
    }
  });
  return out;
}

template <class T>
std::vector<Triplets> subspace_route(const Batch& batch, int64_t k, int64_t iterations, int64_t seed) {
  const Tensor& matrix = batch.tensor;
  const Tensor transposed = torch::stable::transpose(matrix, 1, 2);
  const int64_t count = matrix.size(0), m = matrix.size(1), n = matrix.size(2), width = std::min(m, k + kOversample);
  const Basis random = random_basis(width, n, static_cast<uint64_t>(seed));
  Tensor probe = torch::stable::empty({n, width}, matrix.scalar_type());
  for (int64_t i = 0; i < n * width; ++i) {
    static_cast<T*>(probe.mutable_data_ptr())[i] = static_cast<T>(random.values[i]);
  }
  Tensor basis = orthonormal_columns<T>(torch::stable::matmul(matrix, probe));
  for (int64_t pass = 0; pass < iterations; ++pass) {
    basis = orthonormal_columns<T>(torch::stable::matmul(transposed, basis));
    basis = orthonormal_columns<T>(torch::stable::matmul(matrix, basis));
  }
  std::vector<Triplets> all(count, Triplets{Basis(0, 0), Basis(0, 0), {}, {}});
  const T* columns = static_cast<const T*>(basis.const_data_ptr());
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      Basis start(width, m);
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t v = 0; v < width; ++v) start[v][i] = columns[(b * m + i) * width + v];
      }
      orthonormalise(start);  // rounding to T cost some of it
      all[b] = refine(batch.matrix<T>(b), std::move(start), k, 0, 1);
    }
  });
  return all;
}

template <class T>
void write(const Basis& basis, int64_t k, const std::vector<double>& sign, T* out) {
  for (int64_t i = 0; i < basis.length; ++i) {
    for (int64_t v = 0; v < k; ++v) out[i * k + v] = static_cast<T>(sign[v] * basis[v][i]);
  }
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> pack(const std::vector<Triplets>& all, const Tensor& matrices,
                                                bool transposed, int64_t k) {
  const int64_t count = matrices.size(0), rows = matrices.size(1), columns = matrices.size(2);
  const ScalarType dtype = matrices.scalar_type();
  Tensor left = torch::stable::empty({count, rows, k}, dtype), singular = torch::stable::empty({count, k}, dtype);
  Tensor right = torch::stable::empty({count, columns, k}, dtype), residual = torch::stable::empty({count, k}, dtype);
  for (int64_t b = 0; b < count; ++b) {
    const Basis& u = transposed ? all[b].large : all[b].small;
    const Basis& v = transposed ? all[b].small : all[b].large;
    std::vector<double> sign(k);
    for (int64_t j = 0; j < k; ++j) {
      double sum = 0;
      for (int64_t i = 0; i < rows; ++i) sum += u[j][i];
      sign[j] = sum < 0 ? -1 : 1;
      static_cast<T*>(singular.mutable_data_ptr())[b * k + j] = static_cast<T>(all[b].singular[j]);
      static_cast<T*>(residual.mutable_data_ptr())[b * k + j] = static_cast<T>(all[b].residual[j]);
    }
    write(u, k, sign, static_cast<T*>(left.mutable_data_ptr()) + b * rows * k);
    write(v, k, sign, static_cast<T*>(right.mutable_data_ptr()) + b * columns * k);
  }
  return {left, singular, right, residual};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> solve(const Tensor& matrices, int64_t k, Method method, int64_t iterations,
                                                 int64_t seed) {
  const bool transposed = matrices.size(1) > matrices.size(2);
  Tensor view = matrices.stride(1) == 1 || matrices.stride(2) == 1 ? matrices : torch::stable::contiguous(matrices);
  if (transposed) view = torch::stable::transpose(view, 1, 2);
  const Batch batch{view, transposed};
  const int64_t small = view.size(1);
  const bool gram = method == Method::kGram || (method == Method::kAuto && small <= kGramLimit) ||
                    small <= k + kOversample;
  return pack<T>(gram ? gram_route<T>(batch, k) : subspace_route<T>(batch, k, iterations, seed), matrices, transposed,
                 k);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> leading_singular(const Tensor& matrices, int64_t k, int64_t method,
                                                            int64_t iterations, int64_t seed) {
  check(matrices.dim() == 3, "matrices must have shape [B, M, N], got ", ShapeOf{matrices});
  check(k >= 1 && k <= std::min(matrices.size(1), matrices.size(2)), "k must lie in [1, min(M, N)] for matrices of shape ",
        ShapeOf{matrices}, ", got ", k);
  check(method >= 0 && method <= static_cast<int64_t>(Method::kSubspace), "method must be 0, 1 or 2, got ", method);
  check(iterations >= 0, "iterations must not be negative, got ", iterations);
  return dispatch_floating(matrices, "matrices", [&](auto type) {
    using T = Accumulated<typename decltype(type)::type>;
    const Tensor wide =
        is_half<typename decltype(type)::type> ? torch::stable::to(matrices, ScalarType::Float) : matrices;
    return solve<T>(wide, k, static_cast<Method>(method), iterations, seed);
  });
}

}  // namespace
}  // namespace pyfast_xai

STABLE_TORCH_LIBRARY_IMPL(pyfast_xai, CPU, m) {
  m.impl("leading_singular", TORCH_BOX(&pyfast_xai::leading_singular));
}
