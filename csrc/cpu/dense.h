#pragma once

#include <cstdint>
#include <vector>

// Small dense linear algebra in double. A basis is a list of vectors of one length, one after the other.
namespace pyfast_xai {

double dot(const float* x, const double* y, int64_t n);
double dot(const double* x, const double* y, int64_t n);
void add_scaled(double factor, const float* x, double* y, int64_t n);
void add_scaled(double factor, const double* x, double* y, int64_t n);

// product += sum over rows r of (r . x) r. Each row is read once while it is in cache. Takes at most kRowsAtOnce rows.
constexpr int64_t kRowsAtOnce = 4;
void add_squared(const float* rows, int64_t count, int64_t stride, int64_t n, const double* x, double* product);
void add_squared(const double* rows, int64_t count, int64_t stride, int64_t n, const double* x, double* product);

struct Basis {
  int64_t count, length;
  std::vector<double> values;

  Basis(int64_t count, int64_t length) : count(count), length(length), values(count * length, 0) {}
  void append(const Basis& other) {
    values.insert(values.end(), other.values.begin(), other.values.end());
    count += other.count;
  }
  void truncate(int64_t to) {
    values.resize(to * length);
    count = to;
  }
  double* operator[](int64_t i) { return values.data() + i * length; }
  const double* operator[](int64_t i) const { return values.data() + i * length; }
};

// Returns random vectors, which are not orthogonal.
Basis random_basis(int64_t count, int64_t length, uint64_t seed);

// Gram-Schmidt, twice, of the vectors from `first` on; those before it are orthonormal already. A vector that depends
// on those before it is replaced by one that does not. Needs count <= length. Always returns unit vectors.
void orthonormalise(Basis& basis, int64_t first = 0);

// Vectors x_i . y_j, [x.count, y.count] row-major.
std::vector<double> inner_products(const Basis& x, const Basis& y);

// result_j = sum of rotation[i, j] * basis_i.
Basis rotated(const Basis& basis, const std::vector<double>& rotation);

// Eigenpairs of a symmetric matrix [n, n] by Jacobi rotations: values in falling order, eigenvectors in the columns.
struct Eigen {
  std::vector<double> values, vectors;
};
Eigen symmetric_eigen(std::vector<double> matrix, int64_t n);

}  // namespace pyfast_xai
