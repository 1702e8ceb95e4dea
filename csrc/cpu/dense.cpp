#include "cpu/dense.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "cpu/simd.h"

namespace pyfast_xai {
namespace {

template <class Machine>
using Doubles = typename Vector<double, Machine>::type;

// Loads the numbers at `from`, of any element type, as a vector of doubles.
template <class Machine>
PYFAST_XAI_INLINE void widen(const double* from, Doubles<Machine>& to) {
  to = lanes<Machine>(from)->all;
}
template <class Machine>
PYFAST_XAI_INLINE void widen(const float* from, Doubles<Machine>& to) {
  for (int64_t lane = 0; lane < Vector<double, Machine>::kLanes; ++lane) to[lane] = from[lane];
}

template <class Machine>
PYFAST_XAI_INLINE double sum_of(const Doubles<Machine>& lanes) {
  double sum = 0;
  for (int64_t lane = 0; lane < Vector<double, Machine>::kLanes; ++lane) sum += lanes[lane];
  return sum;
}

template <class Machine, class T>
PYFAST_XAI_INLINE double inner_product_on(const T* x, const double* y, int64_t n) {
  constexpr int64_t kLanes = Vector<double, Machine>::kLanes, kVectors = 16 / kLanes;
  Doubles<Machine> sums[kVectors] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int64_t v = 0; v < kVectors; ++v) {
      Doubles<Machine> wide;
      widen<Machine>(x + i + kLanes * v, wide);
      sums[v] += wide * lanes<Machine>(y + i + kLanes * v)->all;
    }
  }
  for (int64_t v = kVectors / 2; v > 0; v /= 2) {
    for (int64_t w = 0; w < v; ++w) sums[w] += sums[w + v];
  }
  double sum = sum_of<Machine>(sums[0]);
  for (; i < n; ++i) sum += static_cast<double>(x[i]) * y[i];
  return sum;
}
PYFAST_XAI_ON_EACH_MACHINE(double, inner_product, (const float* x, const double* y, int64_t n), (x, y, n))
PYFAST_XAI_ON_EACH_MACHINE(double, inner_product, (const double* x, const double* y, int64_t n), (x, y, n))

template <class Machine, class T>
PYFAST_XAI_INLINE void add_multiple_on(double factor, const T* x, double* y, int64_t n) {
  constexpr int64_t kLanes = Vector<double, Machine>::kLanes;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Doubles<Machine> wide;
    widen<Machine>(x + i, wide);
    lanes<Machine>(y + i)->all += factor * wide;
  }
  for (; i < n; ++i) y[i] += factor * static_cast<double>(x[i]);
}
PYFAST_XAI_ON_EACH_MACHINE(void, add_multiple, (double factor, const float* x, double* y, int64_t n), (factor, x, y, n))
PYFAST_XAI_ON_EACH_MACHINE(void, add_multiple, (double factor, const double* x, double* y, int64_t n),
                           (factor, x, y, n))

template <class Machine, class T>
PYFAST_XAI_INLINE void add_squared_rows_on(const T* rows, int64_t stride, int64_t n, const double* x, double* product) {
  constexpr int64_t kLanes = Vector<double, Machine>::kLanes;
  Doubles<Machine> sums[kRowsAtOnce][2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    for (int half = 0; half < 2; ++half) {
      const Doubles<Machine> factor = lanes<Machine>(x + i + half * kLanes)->all;
      for (int64_t r = 0; r < kRowsAtOnce; ++r) {
        Doubles<Machine> wide;
        widen<Machine>(rows + r * stride + i + half * kLanes, wide);
        sums[r][half] += wide * factor;
      }
    }
  }
  double inner[kRowsAtOnce];
  for (int64_t r = 0; r < kRowsAtOnce; ++r) {
    inner[r] = sum_of<Machine>(sums[r][0] + sums[r][1]);
    for (int64_t j = i; j < n; ++j) inner[r] += static_cast<double>(rows[r * stride + j]) * x[j];
  }
  for (i = 0; i + kLanes <= n; i += kLanes) {
    Doubles<Machine> sum = lanes<Machine>(product + i)->all;
    for (int64_t r = 0; r < kRowsAtOnce; ++r) {
      Doubles<Machine> wide;
      widen<Machine>(rows + r * stride + i, wide);
      sum += inner[r] * wide;
    }
    lanes<Machine>(product + i)->all = sum;
  }
  for (; i < n; ++i) {
    for (int64_t r = 0; r < kRowsAtOnce; ++r) product[i] += inner[r] * static_cast<double>(rows[r * stride + i]);
  }
}
PYFAST_XAI_ON_EACH_MACHINE(void, add_squared_rows,
                           (const float* rows, int64_t stride, int64_t n, const double* x, double* product),
                           (rows, stride, n, x, product))
PYFAST_XAI_ON_EACH_MACHINE(void, add_squared_rows,
                           (const double* rows, int64_t stride, int64_t n, const double* x, double* product),
                           (rows, stride, n, x, product))

void fill_random(double* vector, int64_t n, std::mt19937_64& generator) {
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < n; ++i) vector[i] = normal(generator);
}

// One rotation of the Jacobi method: makes matrix[p, q] zero.
void rotate(std::vector<double>& matrix, std::vector<double>& vectors, int64_t n, int64_t p, int64_t q) {
  const double apart = matrix[q * n + q] - matrix[p * n + p];
  const double theta = apart / (2 * matrix[p * n + q]);
  // std::hypot would need glibc 2.35. Beyond 1e150, where the square overflows, the summand 1 is below rounding.
  const double secant = std::abs(theta) < 1e150 ? std::sqrt(theta * theta + 1) : std::abs(theta);
  const double tangent = std::copysign(1.0, theta) / (std::abs(theta) + secant);
  const double cosine = 1 / std::sqrt(tangent * tangent + 1), sine = tangent * cosine;
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

// Returns whether element [p, q] is above rounding beside the two diagonal elements that it couples.
bool coupled(const std::vector<double>& matrix, int64_t n, int64_t p, int64_t q) {
  const double product = std::abs(matrix[p * n + p]) * std::abs(matrix[q * n + q]);
  return std::abs(matrix[p * n + q]) > 1e-16 * std::sqrt(product) && std::abs(matrix[p * n + q]) > 1e-300;
}

}  // namespace

double dot(const float* x, const double* y, int64_t n) { return inner_product(x, y, n); }
double dot(const double* x, const double* y, int64_t n) { return inner_product(x, y, n); }
void add_scaled(double factor, const float* x, double* y, int64_t n) { add_multiple(factor, x, y, n); }
void add_scaled(double factor, const double* x, double* y, int64_t n) { add_multiple(factor, x, y, n); }

void add_squared(const float* rows, int64_t count, int64_t stride, int64_t n, const double* x, double* product) {
  if (count == kRowsAtOnce) return add_squared_rows(rows, stride, n, x, product);
  for (int64_t r = 0; r < count; ++r) add_scaled(dot(rows + r * stride, x, n), rows + r * stride, product, n);
}
void add_squared(const double* rows, int64_t count, int64_t stride, int64_t n, const double* x, double* product) {
  if (count == kRowsAtOnce) return add_squared_rows(rows, stride, n, x, product);
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
