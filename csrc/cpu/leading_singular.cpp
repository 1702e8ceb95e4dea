#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/dense.h"
#include "dispatch.h"

namespace pyfast_xai {
namespace {

constexpr int64_t kOversample = 8;
constexpr int64_t kGramLimit = 1024;  // small side above which a Gram matrix, should it be needed, is too large
constexpr int64_t kKrylovLimit = 64;  // vectors of a Krylov space, before the Gram matrix is diagonalised instead
constexpr int64_t kEveryStep = 16;    // vectors up to which every step tests for convergence
constexpr int kRefinements = 3;

// A matrix inside a batch; the numbers of a row are next to each other.
template <class T>
struct Matrix {
  const T* data;
  int64_t rows, columns, stride;

  // A x for every x.
  Basis times(const Basis& x) const {
    Basis y(x.count, rows);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t v = 0; v < x.count; ++v) y[v][i] = dot(data + i * stride, x[v], columns);
    }
    return y;
  }

  // A^T y for every y.
  Basis transposed_times(const Basis& y) const {
    Basis x(y.count, columns);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t v = 0; v < y.count; ++v) add_scaled(y[v][i], data + i * stride, x[v], columns);
    }
    return x;
  }

  // A^T A x for every x, in one pass over the matrix.
  Basis squared_times(const Basis& x, int64_t first) const {
    Basis product(x.count - first, columns);
    for (int64_t i = 0; i < rows; i += kRowsAtOnce) {
      const int64_t count = std::min(kRowsAtOnce, rows - i);
      for (int64_t v = 0; v < product.count; ++v) {
        add_squared(data + i * stride, count, stride, columns, x[first + v], product[v]);
      }
    }
    return product;
  }
};

struct Triplets {
  Basis left, right;  // singular vectors of a matrix [rows, columns]
  std::vector<double> singular, residual;
};

// The best triplets within the span of `x`, an orthonormal basis of the space of rows: A x is rotated until its
// vectors are orthogonal, and one product with the matrix more says how far they are from singular vectors. While
// that is more than `tolerance`, the product is the better basis to start again from.
template <class T>
Triplets refine(const Matrix<T>& matrix, Basis x, int64_t k, double tolerance, int rounds) {
  for (int round = 1;; ++round) {
    Basis y = matrix.times(x);
    const Eigen eigen = symmetric_eigen(inner_products(y, y), x.count);
    x = rotated(x, eigen.vectors);
    y = rotated(y, eigen.vectors);
    std::vector<double> singular(x.count);
    for (int64_t v = 0; v < x.count; ++v) singular[v] = std::sqrt(dot(y[v], y[v], y.length));
    orthonormalise(y);

    Basis product = matrix.transposed_times(y);
    const double scale = std::max(singular[0], std::numeric_limits<double>::min());
    std::vector<double> residual(k);
    for (int64_t v = 0; v < k; ++v) {
      std::vector<double> error(product[v], product[v] + product.length);
      add_scaled(-singular[v], x[v], error.data(), product.length);
      residual[v] = std::sqrt(dot(error.data(), error.data(), product.length)) / scale;
    }
    if (round >= rounds || *std::max_element(residual.begin(), residual.end()) <= tolerance) {
      return {std::move(y), std::move(x), std::move(singular), std::move(residual)};
    }
    x = std::move(product);
    orthonormalise(x);
  }
}

// The leading `k` eigenvectors of A^T A by block Lanczos with full reorthogonalisation (Golub and Underwood, 1977);
// false where they have not converged to `tolerance` (relative to the largest eigenvalue) in a space of kKrylovLimit
// vectors, which takes many eigenvalues close to the largest, or many that are asked for. A block as wide as `k` finds
// as many equal ones.
template <class T>
bool leading_eigenvectors(const Matrix<T>& matrix, int64_t k, double tolerance, Basis& result) {
  const int64_t n = matrix.columns, limit = std::min(n, kKrylovLimit);
  if (4 * k > limit && limit < n) return false;
  Basis basis(0, n);
  Basis block = random_basis(k, n, 0);
  std::vector<std::vector<double>> products;  // products[j][i], i <= j, is basis_i . A^T A basis_j
  int64_t checked = 0;
  for (;;) {
    const int64_t before = basis.count;
    block.truncate(std::min(block.count, limit - before));
    basis.append(block);
    orthonormalise(basis, before);
    block = matrix.squared_times(basis, before);
    const int64_t count = basis.count;
    for (int64_t v = 0; v < block.count; ++v) {
      std::vector<double> column(before + v + 1);
      for (int64_t i = 0; i <= before + v; ++i) column[i] = dot(basis[i], block[v], n);
      products.push_back(std::move(column));
      for (int pass = 0; pass < 2; ++pass) {
        for (int64_t i = 0; i < count; ++i) add_scaled(-dot(basis[i], block[v], n), basis[i], block[v], n);
      }
    }
    const bool full = count == limit;
    if (!full && count > kEveryStep && count < checked + checked / 4) continue;
    checked = count;

    std::vector<double> inner(count * count);
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t i = 0; i <= j; ++i) inner[i * count + j] = inner[j * count + i] = products[j][i];
    }
    const Eigen eigen = symmetric_eigen(std::move(inner), count);
    // A^T A maps the space into itself but for what is left of the last block.
    double worst = 0;
    const std::vector<double> left = inner_products(block, block);
    for (int64_t v = 0; v < k; ++v) {
      double square = 0;
      for (int64_t i = 0; i < block.count; ++i) {
        for (int64_t j = 0; j < block.count; ++j) {
          square += left[i * block.count + j] * eigen.vectors[(before + i) * count + v] *
                    eigen.vectors[(before + j) * count + v];
        }
      }
      worst = std::max(worst, std::sqrt(std::max(square, 0.0)));
    }
    if (count == n || worst <= tolerance * eigen.values[0]) {
      for (int64_t v = 0; v < k; ++v) {
        for (int64_t i = 0; i < count; ++i) add_scaled(eigen.vectors[i * count + v], basis[i], result[v], n);
      }
      return true;
    }
    if (full) return false;
  }
}

// A tensor [B, rows, columns] of matrices whose columns have a stride of one.
template <class T>
Matrix<T> matrix_of(const Tensor& matrices, int64_t b) {
  return {static_cast<const T*>(matrices.const_data_ptr()) + b * matrices.stride(0), matrices.size(1), matrices.size(2),
          matrices.stride(1)};
}

// Computes the leading `k` right singular vectors by LAPACK from the Gram matrix of the smaller side: slow but safe.
template <class T>
Basis diagonalised(const Tensor& matrices, int64_t b, int64_t k) {
  const bool wide = matrices.size(1) < matrices.size(2);
  Tensor all = matrices;
  Tensor own = torch::stable::narrow(all, 0, b, 1);
  if (own.scalar_type() != ScalarType::Double) own = torch::stable::to(own, ScalarType::Double);
  const Tensor turned = torch::stable::transpose(own, 1, 2);
  const Tensor gram = wide ? torch::stable::matmul(own, turned) : torch::stable::matmul(turned, own);
  std::array<StableIValue, 2> stack{torch::stable::detail::from(gram), torch::stable::detail::from(std::string("L"))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linalg_eigh", "", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // the values
  const auto vectors = torch::stable::contiguous(torch::stable::detail::to<Tensor>(stack[1]));
  const auto* columns = static_cast<const double*>(vectors.const_data_ptr());
  const int64_t m = gram.size(1);
  Basis basis(k, m);
  for (int64_t v = 0; v < k; ++v) {  // LAPACK's order is rising
    for (int64_t i = 0; i < m; ++i) basis[v][i] = columns[i * m + m - 1 - v];
  }
  if (wide) basis = matrix_of<T>(matrices, b).transposed_times(basis);
  orthonormalise(basis);
  return basis;
}

template <class T>
std::vector<Triplets> gram_route(const Tensor& matrices, int64_t k) {
  const int64_t count = matrices.size(0);
  const bool exact = std::is_same_v<T, double>;
  std::vector<Basis> starts(count, Basis(k, matrices.size(2)));
  std::vector<char> converged(count);
  std::vector<Triplets> all(count, Triplets{Basis(0, 0), Basis(0, 0), {}, {}});
  const auto finish = [&](int64_t b) {
    all[b] = refine(matrix_of<T>(matrices, b), std::move(starts[b]), k, exact ? 1e-13 : 1e-7, kRefinements);
  };
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      converged[b] = leading_eigenvectors(matrix_of<T>(matrices, b), k, exact ? 1e-14 : 1e-8, starts[b]);
      if (converged[b]) finish(b);
    }
  });
  for (int64_t b = 0; b < count; ++b) {
    if (converged[b]) continue;
    starts[b] = diagonalised<T>(matrices, b, k);
    finish(b);
  }
  return all;
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
std::vector<Triplets> subspace_route(const Tensor& matrices, int64_t k, int64_t iterations, int64_t seed) {
  const Tensor transposed = torch::stable::transpose(matrices, 1, 2);
  const int64_t count = matrices.size(0), m = matrices.size(1), n = matrices.size(2);
  const int64_t width = std::min({m, n, k + kOversample});
  const Basis random = random_basis(width, m, static_cast<uint64_t>(seed));
  Tensor probe = torch::stable::empty({m, width}, matrices.scalar_type());
  for (int64_t i = 0; i < m * width; ++i) {
    static_cast<T*>(probe.mutable_data_ptr())[i] = static_cast<T>(random.values[i]);
  }
  Tensor basis = orthonormal_columns<T>(torch::stable::matmul(transposed, probe));
  for (int64_t pass = 0; pass < iterations; ++pass) {
    basis = orthonormal_columns<T>(torch::stable::matmul(matrices, basis));
    basis = orthonormal_columns<T>(torch::stable::matmul(transposed, basis));
  }
  std::vector<Triplets> all(count, Triplets{Basis(0, 0), Basis(0, 0), {}, {}});
  const T* columns = static_cast<const T*>(basis.const_data_ptr());
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      Basis start(width, n);
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t v = 0; v < width; ++v) start[v][i] = columns[(b * n + i) * width + v];
      }
      orthonormalise(start);  // rounding to T has lost some orthogonality
      all[b] = refine(matrix_of<T>(matrices, b), std::move(start), k, 0, 1);
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
    const Basis& u = transposed ? all[b].right : all[b].left;
    const Basis& v = transposed ? all[b].left : all[b].right;
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
std::tuple<Tensor, Tensor, Tensor, Tensor> solve(const Tensor& matrices, int64_t k, Solver solver, int64_t iterations,
                                                 int64_t seed) {
  // Takes the matrix or its transpose, whichever has contiguous rows.
  const bool transposed = matrices.stride(1) == 1 && matrices.stride(2) != 1;
  const Tensor view = transposed                ? torch::stable::transpose(matrices, 1, 2)
                      : matrices.stride(2) == 1 ? matrices
                                                : torch::stable::contiguous(matrices);
  const int64_t small = std::min(view.size(1), view.size(2));
  const bool gram =
      solver == Solver::GRAM || (solver == Solver::AUTO && small <= kGramLimit) || small <= k + kOversample;
  return pack<T>(gram ? gram_route<T>(view, k) : subspace_route<T>(view, k, iterations, seed), matrices, transposed, k);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> leading_singular(const Tensor& matrices, int64_t k, int64_t solver,
                                                            int64_t iterations, int64_t seed) {
  checks::leading_singular(matrices, k, solver, iterations, seed);
  return dispatch_floating(matrices, [&](auto type) {
    using T = Accumulated<typename decltype(type)::type>;
    const Tensor wide =
        is_half<typename decltype(type)::type> ? torch::stable::to(matrices, ScalarType::Float) : matrices;
    return solve<T>(wide, k, static_cast<Solver>(solver), iterations, seed);
  });
}

}  // namespace
}  // namespace pyfast_xai

STABLE_TORCH_LIBRARY_IMPL(pyfast_xai, CPU, m) { m.impl("leading_singular", TORCH_BOX(&pyfast_xai::leading_singular)); }
