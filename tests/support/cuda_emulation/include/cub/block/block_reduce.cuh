#pragma once

#include <cuda_runtime.h>

namespace cub {

// The sum of a block, valid in thread 0. As in CUB, the storage may be used again behind a barrier only.
template <class T, int kThreads>
class BlockReduce {
 public:
  struct TempStorage {
    T values[kThreads];
  };

  explicit BlockReduce(TempStorage& storage) : storage_(storage) {}

  T Sum(T value) {
    storage_.values[threadIdx.x] = value;
    __syncthreads();
    T sum = 0;
    if (threadIdx.x == 0) {
      for (const T& one : storage_.values) sum += one;
    }
    return sum;
  }

 private:
  TempStorage& storage_;
};

}  // namespace cub
