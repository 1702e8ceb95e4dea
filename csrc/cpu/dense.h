#pragma once

#include <cstdint>
#include <vector>

// Small dense linear algebra in double. A basis is a list of vectors of one length, one after the other.
namespace pyfast_xai {

double dot(const float* x, const double* y, int64_t n);
double dot(const double* x, const double* y, int64_t n);
void add_scaled(double factor, const float* x, double* y, int64_t n);
void add_scaled(double factor, const double* x, double* y, int64_t n);

struct Basis {
  int64_t count, length;
  std::vector<double> values;

  Basis(int64_t count, int64_t length) : count(count), length(length), values(count * length, 0) {}
  double* operator[](int64_t i) { return values.data() + i * length; }
  const double* operator[](int64_t i) const { return values.data() + i * length; }
};

// Random vectors, not yet orthogonal.
Basis random_basis(int64_t count, int64_t length, uint64_t seed);

// Gram-Schmidt, twice; a vector that depends on those before it is replaced by one that does not. Needs
// count <= length. Always returns unit vectors.
void orthonormalise(Basis& basis);

// Vectors x_i . y_j, [x.count, y.count] row-major.
std::vector<double> inner_products(const Basis& x, const Basis& y);

// result_j = sum of rotation[i, j] * basis_i.
Basis rotated(const Basis& basis, const std::vector<double>& rotation);

// Eigenpairs of a symmetric matrix [n, n] by Jacobi rotations: values in falling order, eigenvectors in the columns.
struct Eigen {
  std::vector<double> values, vectors;
};
Eigen symmetric_eigen(std::vector<double> matrix, int64_t n);

// matrix [m, m] times every vector of the basis; `matrix` symmetric.
Basis multiply_symmetric(const double* matrix, const Basis& basis);

}  // namespace pyfast_xai
