#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace pyfast_xai {

// Returns an int64 list for `found` entries; with a capacity, the list has that length, filled with -1 behind them.
torch::stable::Tensor list_of(int64_t found, std::optional<int64_t> capacity);

// The set bits of a bit matrix [rows, words] as sorted flat indices into [rows, columns], int64; with a capacity, that
// many entries and -1 behind the last.
torch::stable::Tensor set_positions(const uint64_t* bits, int64_t rows, int64_t words, int64_t columns,
                                    std::optional<int64_t> capacity);

}  // namespace pyfast_xai
