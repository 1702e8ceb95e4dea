#pragma once

#include <cuda_runtime.h>

namespace cub {

// The sums of what stands before each thread of a block. As in CUB, the storage may be used again behind a barrier only.
template <class T, int kThreads>
class BlockScan {
 public:
  struct TempStorage {
    T values[kThreads];
    T total;
  };

  explicit BlockScan(TempStorage& storage) : storage_(storage) {}

  void ExclusiveSum(T value, T& before, T& total) {
    storage_.values[threadIdx.x] = value;
    __syncthreads();
    if (threadIdx.x == 0) {
      T sum = 0;
      for (T& one : storage_.values) {
        const T next = sum + one;
        one = sum;
        sum = next;
      }
      storage_.total = sum;
    }
    __syncthreads();
    before = storage_.values[threadIdx.x];
    total = storage_.total;
  }

  void ExclusiveSum(T value, T& before) {
    T total;
    ExclusiveSum(value, before, total);
  }

 private:
  TempStorage& storage_;
};

}  // namespace cub
