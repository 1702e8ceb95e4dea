#pragma once

#include "cuda/point_check.h"

namespace pyfast_xai {

// A cleared bit matrix of `words` words on the device of `like`.
Tensor cleared_words(const Tensor& like, int64_t words, cudaStream_t stream);

// The set bits of a bit matrix [rows, words] on the device as sorted flat indices into [rows, columns], int64. Waits
// for the stream to learn how many, and there throws if one of `points`, each in [0, size), was noted as outside.
Tensor set_positions(const uint64_t* bits, int64_t rows, int64_t words, int64_t columns, const OutcomeOnDevice& outcome,
                     const Tensor& points, int64_t size, cudaStream_t stream);

}  // namespace pyfast_xai
