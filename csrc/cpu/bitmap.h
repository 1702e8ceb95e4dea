#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace pyfast_xai {

// The set bits of a bit matrix [rows, words] as sorted flat indices into [rows, columns], int64.
torch::stable::Tensor set_positions(const uint64_t* bits, int64_t rows, int64_t words, int64_t columns);

}  // namespace pyfast_xai
