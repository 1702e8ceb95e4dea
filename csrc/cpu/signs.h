#pragma once

#include <cstdint>

#include "dispatch.h"
#include "pyfast_xai/bits.h"

namespace pyfast_xai {

// Bit j of `positive` is values[j] > 0 and bit j of `negative` is values[j] < 0; a NaN sets neither.
void sign_words(const float* values, int64_t count, uint64_t* positive, uint64_t* negative);
void sign_words(const double* values, int64_t count, uint64_t* positive, uint64_t* negative);
void sign_words(const Half* values, int64_t count, uint64_t* positive, uint64_t* negative);
void sign_words(const BFloat16* values, int64_t count, uint64_t* positive, uint64_t* negative);

// `sign_words` of every row of a contiguous matrix [rows, columns] into [rows, words_for(columns)].
void sign_matrix(const Tensor& matrix, uint64_t* positive, uint64_t* negative);

}  // namespace pyfast_xai
