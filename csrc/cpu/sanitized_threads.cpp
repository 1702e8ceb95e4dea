#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <thread>
#include <vector>

// Replaces torch's parallel_for in a library for ThreadSanitizer, which cannot follow torch's OpenMP runtime. Threads
// that the sanitizer knows start and join here, so that it sees which accesses are ordered.
extern "C" AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t, ParallelFunc body, void* context) {
  constexpr int64_t kThreads = 4;
  const int64_t share = (end - begin + kThreads - 1) / kThreads;
  std::vector<std::thread> threads;
  for (int64_t at = begin; at < end; at += share) {
    threads.emplace_back([=] { body(at, std::min(at + share, end), context); });
  }
  for (std::thread& thread : threads) thread.join();
  return AOTI_TORCH_SUCCESS;
}
