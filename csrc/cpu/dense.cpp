#include "cpu/dense.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "cpu/simd.h"

namespace pyfast_xai {
namespace {

using Doubles = Vector<double>;
typedef float FourFloats __attribute__((vector_size(16), aligned(4), may_alias));

// Vector `from` widened to double, whatever it is stored as.
PYFAST_XAI_INLINE void widen(const double* from, Doubles::type& to) { to = *lanes(from); }
PYFAST_XAI_INLINE void widen(const float* from, Doubles::type& to) {
  to = __builtin_convertvector(*reinterpret_cast<const FourFloats*>(from), Doubles::type);
}

template <class T>
PYFAST_XAI_INLINE double dot_body(const T* x, const double* y, int64_t n) {
  Doubles::type sums[4] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int v = 0; v < 4; ++v) {
      Doubles::type wide;
      widen(x + i + 4 * v, wide);
      sums[v] += wide * *lanes(y + i + 4 * v);
    }
  }
  const Doubles::type all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double sum = (all[0] + all[1]) + (all[2] + all[3]);
  for (; i < n; ++i) sum += static_cast<double>(x[i]) * y[i];
  return sum;
}

template <class T>
PYFAST_XAI_INLINE void add_scaled_body(double factor, const T* x, double* y, int64_t n) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    Doubles::type wide;
    widen(x + i, wide);
    *lanes(y + i) += factor * wide;
  }
  for (; i < n; ++i) y[i] += factor * static_cast<double>(x[i]);
}

PYFAST_XAI_CLONES double dot_float(const float* x, const double* y, int64_t n) { return dot_body(x, y, n); }
PYFAST_XAI_CLONES double dot_double(const double* x, const double* y, int64_t n) { return dot_body(x, y, n); }
PYFAST_XAI_CLONES void add_scaled_float(double factor, const float* x, double* y, int64_t n) {
  add_scaled_body(factor, x, y, n);
}
PYFAST_XAI_CLONES void add_scaled_double(double factor, const double* x, double* y, int64_t n) {
  add_scaled_body(factor, x, y, n);
}

template <class T>
PYFAST_XAI_INLINE void add_squared_body(const T* rows, int64_t stride, int64_t n, const double* x, double* product) {
  constexpr int64_t kWidth = Doubles::kLanes;
  Doubles::type sums[kRowsAtOnce][2] = {};
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    for (int half = 0; half < 2; ++half) {
      const Doubles::type factor = *lanes(x + i + half * kWidth);
      for (int64_t r = 0; r < kRowsAtOnce; ++r) {
        Doubles::type wide;
        widen(rows + r * stride + i + half * kWidth, wide);
        sums[r][half] += wide * factor;
      }
    }
  }
  double inner[kRowsAtOnce];
  for (int64_t r = 0; r < kRowsAtOnce; ++r) {
    const Doubles::type all = sums[r][0] + sums[r][1];
    inner[r] = (all[0] + all[1]) + (all[2] + all[3]);
    for (int64_t j = i; j < n; ++j) inner[r] += static_cast<double>(rows[r * stride + j]) * x[j];
  }
  for (i = 0; i + kWidth <= n; i += kWidth) {
    Doubles::type sum = *lanes(product + i);
    for (int64_t r = 0; r < kRowsAtOnce; ++r) {
      Doubles::type wide;
      widen(rows + r * stride + i, wide);
      sum += inner[r] * wide;
    }
    *lanes(product + i) = sum;
  }
  for (; i < n; ++i) {
    for (int64_t r = 0; r < kRowsAtOnce; ++r) product[i] += inner[r] * static_cast<double>(rows[r * stride + i]);
  }
}

PYFAST_XAI_CLONES void add_squared_float(const float* rows, int64_t stride, int64_t n, const double* x,
                                         double* product) {
  add_squared_body(rows, stride, n, x, product);
}
PYFAST_XAI_CLONES void add_squared_double(const double* rows, int64_t stride, int64_t n, const double* x,
                                          double* product) {
  add_squared_body(rows, stride, n, x, product);
}

void fill_random(double* vector, int64_t n, std::mt19937_64& generator) {
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < n; ++i) vector[i] = normal(generator);
}

// One rotation of the Jacobi method: makes matrix[p, q] zero.
void rotate(std::vector<double>& matrix, std::vector<double>& vectors, int64_t n, int64_t p, int64_t q) {
  const double apart = matrix[q * n + q] - matrix[p * n + p];
  const double theta = apart / (2 * matrix[p * n + q]);
  const double tangent = std::copysign(1.0, theta) / (std::abs(theta) + std::hypot(theta, 1.0));
  const double cosine = 1 / std::hypot(tangent, 1.0), sine = tangent * cosine;
  for (int64_t i = 0; i < n; ++i) {
    const double a = matrix[i * n + p], b = matrix[i * n + q];
    matrix[i * n + p] = cosine * a - sine * b;
    matrix[i * n + q] = sine * a + cosine * b;
  }
  for (int64_t i = 0; i < n; ++i) {
    const double a = matrix[p * n + i], b = matrix[q * n + i];
    matrix[p * n + i] = cosine * a - sine * b;
    matrix[q * n + i] = sine * a + cosine * b;
  }
  for (int64_t i = 0; i < n; ++i) {
    const double a = vectors[i * n + p], b = vectors[i * n + q];
    vectors[i * n + p] = cosine * a - sine * b;
    vectors[i * n + q] = sine * a + cosine * b;
  }
}

// Whether element [p, q] still matters beside the two diagonal elements it couples.
bool coupled(const std::vector<double>& matrix, int64_t n, int64_t p, int64_t q) {
  const double product = std::abs(matrix[p * n + p]) * std::abs(matrix[q * n + q]);
  return std::abs(matrix[p * n + q]) > 1e-16 * std::sqrt(product) && std::abs(matrix[p * n + q]) > 1e-300;
}

}  // namespace

double dot(const float* x, const double* y, int64_t n) { return dot_float(x, y, n); }
double dot(const double* x, const double* y, int64_t n) { return dot_double(x, y, n); }
void add_scaled(double factor, const float* x, double* y, int64_t n) { add_scaled_float(factor, x, y, n); }
void add_scaled(double factor, const double* x, double* y, int64_t n) { add_scaled_double(factor, x, y, n); }

void add_squared(const float* rows, int64_t count, int64_t stride, int64_t n, const double* x, double* product) {
  if (count == kRowsAtOnce) return add_squared_float(rows, stride, n, x, product);
  for (int64_t r = 0; r < count; ++r) add_scaled(dot(rows + r * stride, x, n), rows + r * stride, product, n);
}
void add_squared(const double* rows, int64_t count, int64_t stride, int64_t n, const double* x, double* product) {
  if (count == kRowsAtOnce) return add_squared_double(rows, stride, n, x, product);
  for (int64_t r = 0; r < count; ++r) add_scaled(dot(rows + r * stride, x, n), rows + r * stride, product, n);
}

Basis random_basis(int64_t count, int64_t length, uint64_t seed) {
  Basis basis(count, length);
  std::mt19937_64 generator(seed);
  fill_random(basis.values.data(), count * length, generator);
  return basis;
}

void orthonormalise(Basis& basis, int64_t first) {
  const int64_t n = basis.length;
  std::mt19937_64 generator(1);
  for (int64_t i = first; i < basis.count; ++i) {
    double* vector = basis[i];
    for (int attempt = 0;; ++attempt) {
      const double before = std::sqrt(dot(vector, vector, n));
      if (before > 0 && std::isfinite(before)) {
        for (int64_t j = 0; j < n; ++j) vector[j] /= before;
      }
      double norm = 0;
      for (int pass = 0; pass < 2; ++pass) {
        for (int64_t j = 0; j < i; ++j) add_scaled(-dot(vector, basis[j], n), basis[j], vector, n);
        norm = std::sqrt(dot(vector, vector, n));
        if (!(norm > 1e-13)) break;
        for (int64_t j = 0; j < n; ++j) vector[j] /= norm;
      }
      if (norm > 1e-13 || attempt > 8) break;
      fill_random(vector, n, generator);
    }
  }
}

std::vector<double> inner_products(const Basis& x, const Basis& y) {
  std::vector<double> products(x.count * y.count);
  for (int64_t i = 0; i < x.count; ++i) {
    for (int64_t j = 0; j < y.count; ++j) products[i * y.count + j] = dot(x[i], y[j], x.length);
  }
  return products;
}

Basis rotated(const Basis& basis, const std::vector<double>& rotation) {
  Basis result(basis.count, basis.length);
  for (int64_t i = 0; i < basis.count; ++i) {
    for (int64_t j = 0; j < basis.count; ++j) {
      add_scaled(rotation[i * basis.count + j], basis[i], result[j], basis.length);
    }
  }
  return result;
}

Eigen symmetric_eigen(std::vector<double> matrix, int64_t n) {
  std::vector<double> vectors(n * n, 0);
  for (int64_t i = 0; i < n; ++i) vectors[i * n + i] = 1;
  bool moved = true;
  for (int sweep = 0; sweep < 60 && moved; ++sweep) {
    moved = false;
    for (int64_t p = 0; p < n; ++p) {
      for (int64_t q = p + 1; q < n; ++q) {
        if (!coupled(matrix, n, p, q)) continue;
        rotate(matrix, vectors, n, p, q);
        moved = true;
      }
    }
  }
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return matrix[a * n + a] > matrix[b * n + b]; });
  Eigen eigen{std::vector<double>(n), std::vector<double>(n * n)};
  for (int64_t j = 0; j < n; ++j) {
    eigen.values[j] = matrix[order[j] * n + order[j]];
    for (int64_t i = 0; i < n; ++i) eigen.vectors[i * n + j] = vectors[i * n + order[j]];
  }
  return eigen;
}

}  // namespace pyfast_xai
