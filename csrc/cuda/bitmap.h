#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>

#include "cuda/device.h"

namespace pyfast_xai {

// A cleared bit matrix of `words` words on the device of `like`.
Tensor cleared_words(const Tensor& like, int64_t words, cudaStream_t stream);

// The set bits of a bit matrix [rows, words] on the device as sorted flat indices into [rows, columns], int64; `most`
// is how many there can be. With a capacity, the result has that many entries, -1 behind the last, and more set bits
// are an assertion of the device. Without, the stream is waited for to learn how many there are.
Tensor set_positions(const uint64_t* bits, int64_t rows, int64_t words, int64_t columns, int64_t most,
                     std::optional<int64_t> capacity, const Tensor& like, cudaStream_t stream);

}  // namespace pyfast_xai
