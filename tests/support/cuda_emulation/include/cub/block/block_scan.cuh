#pragma once

#include <cuda_runtime.h>

namespace cub {

// The sums of what stands before each thread of a block. As in CUB, the storage may be used again behind a barrier only.
template <class T, int kThreads>
class BlockScan {
 public:
  struct TempStorage {
    T values[kThreads];
  };

  explicit BlockScan(TempStorage& storage) : storage_(storage) {}

  void ExclusiveSum(T value, T& before, T& total) {
    storage_.values[threadIdx.x] = value;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int i = 1; i < kThreads; ++i) storage_.values[i] += storage_.values[i - 1];
    }
    __syncthreads();
    // What others wrote, so that a next sum without a barrier before it is a race.
    before = threadIdx.x == 0 ? T(0) : storage_.values[threadIdx.x - 1];
    total = storage_.values[kThreads - 1];
  }

  void ExclusiveSum(T value, T& before) {
    T total;
    ExclusiveSum(value, before, total);
  }

 private:
  TempStorage& storage_;
};

}  // namespace cub
