#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "checks.h"
#include "cpu/signs.h"

namespace pyfast_xai {
namespace {

std::tuple<Tensor, Tensor> sign_bits(const Tensor& weight) {
  checks::sign_bits(weight);
  const Tensor matrix = torch::stable::contiguous(weight);
  const int64_t words = words_for(matrix.size(1));
  Tensor positive = torch::stable::empty({matrix.size(0), words}, ScalarType::Long);
  Tensor negative = torch::stable::empty({matrix.size(0), words}, ScalarType::Long);
  sign_matrix(matrix, static_cast<uint64_t*>(positive.mutable_data_ptr()),
              static_cast<uint64_t*>(negative.mutable_data_ptr()));
  return {positive, negative};
}

}  // namespace
}  // namespace pyfast_xai

STABLE_TORCH_LIBRARY_IMPL(pyfast_xai, CPU, m) { m.impl("sign_bits", TORCH_BOX(&pyfast_xai::sign_bits)); }
