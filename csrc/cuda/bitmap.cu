#include <torch/headeronly/macros/Macros.h>

#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "cuda/bitmap.h"
#include "pyfast_xai/bits.h"

namespace pyfast_xai {
namespace {

constexpr int kThreads = 256;  // also the words of a chunk
constexpr int kScanThreads = 512;

// counts[c] = set bits of chunk c.
__global__ void __launch_bounds__(kThreads)
    count_kernel(const uint64_t* bits, int64_t total, int64_t chunks, int64_t* counts) {
  using Reduce = cub::BlockReduce<int, kThreads>;
  __shared__ typename Reduce::TempStorage storage;
  for (int64_t c = blockIdx.x; c < chunks; c += gridDim.x) {
    const int64_t i = c * kThreads + threadIdx.x;
    const int count = Reduce(storage).Sum(i < total ? __popcll(bits[i]) : 0);
    if (threadIdx.x == 0) counts[c] = count;
    __syncthreads();  // the storage serves the next chunk
  }
}

// counts[c] = the sum of the counts before it, computed in place by one block; the total follows the last count. There
// are a thousand times fewer counts than words.
__global__ void __launch_bounds__(kScanThreads) scan_kernel(int64_t* counts, int64_t chunks, int64_t capacity) {
  using Scan = cub::BlockScan<int64_t, kScanThreads>;
  __shared__ typename Scan::TempStorage storage;
  int64_t before = 0;
  for (int64_t base = 0; base < chunks; base += kScanThreads) {
    const int64_t c = base + threadIdx.x;
    int64_t first, sum;
    Scan(storage).ExclusiveSum(c < chunks ? counts[c] : 0, first, sum);
    if (c < chunks) counts[c] = before + first;
    before += sum;
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    CUDA_KERNEL_ASSERT(before <= capacity && "capacity must be at least the number of points found");
    counts[chunks] = before;
  }
}

__global__ void __launch_bounds__(kThreads)
    write_kernel(const uint64_t* bits, int64_t total, int64_t chunks, int64_t words, int64_t columns,
                 const int64_t* first, int64_t* out) {
  using Scan = cub::BlockScan<int, kThreads>;
  __shared__ typename Scan::TempStorage storage;
  for (int64_t c = blockIdx.x; c < chunks; c += gridDim.x) {
    const int64_t i = c * kThreads + threadIdx.x;
    const uint64_t word = i < total ? bits[i] : 0;
    int before;
    Scan(storage).ExclusiveSum(__popcll(word), before);
    write_places(word, i / words * columns + i % words * kWordBits, out + first[c] + before);
    __syncthreads();
  }
}

}  // namespace

Tensor cleared_words(const Tensor& like, int64_t words, cudaStream_t stream) {
  Tensor memory = torch::stable::new_empty(like, {words}, ScalarType::Long);
  if (words > 0) {
    check_cuda(cudaMemsetAsync(memory.mutable_data_ptr(), 0, words * sizeof(uint64_t), stream), "clearing a bitmap");
  }
  return memory;
}

Tensor set_positions(const uint64_t* bits, int64_t rows, int64_t words, int64_t columns, int64_t most,
                     std::optional<int64_t> capacity, const Tensor& like, cudaStream_t stream) {
  const int64_t total = rows * words, chunks = (total + kThreads - 1) / kThreads, entries = capacity.value_or(most);
  const Tensor counts = torch::stable::new_empty(like, {chunks + 1}, ScalarType::Long);
  auto* first = static_cast<int64_t*>(counts.mutable_data_ptr());
  Tensor out = torch::stable::new_empty(like, {entries}, ScalarType::Long);
  if (entries > 0) {
    // All ones is -1.
    check_cuda(cudaMemsetAsync(out.mutable_data_ptr(), 0xFF, entries * sizeof(int64_t), stream), "clearing a list");
  }
  if (chunks > 0) {
    count_kernel<<<blocks_for(chunks, 1), kThreads, 0, stream>>>(bits, total, chunks, first);
    check_launch("count_kernel");
  }
  scan_kernel<<<1, kScanThreads, 0, stream>>>(first, chunks, entries);
  check_launch("scan_kernel");
  if (chunks > 0) {
    write_kernel<<<blocks_for(chunks, 1), kThreads, 0, stream>>>(bits, total, chunks, words, columns, first,
                                                                 static_cast<int64_t*>(out.mutable_data_ptr()));
    check_launch("write_kernel");
  }
  if (capacity) return out;

  int64_t found;
  check_cuda(cudaMemcpyAsync(&found, first + chunks, sizeof(found), cudaMemcpyDeviceToHost, stream),
             "fetching a number of points");
  check_cuda(cudaStreamSynchronize(stream), "running the kernels");
  return torch::stable::narrow(out, 0, 0, found);
}

}  // namespace pyfast_xai
