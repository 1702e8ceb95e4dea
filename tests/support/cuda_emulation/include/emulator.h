#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

// Runs CUDA kernels on the CPU, one fiber a thread, block after block. Every access to memory is checked: it must lie in
// a tensor that was passed to the kernel, in shared memory, or on the thread's stack, and must not race with another
// thread's. Barriers and warp exchanges must be reached by all threads that take part, at the same line.
namespace emulated {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

struct Position {
  Dim3 thread, block, block_size, grid_size;
};

// The position of the running thread.
Position here();

// Blocks until every thread of the block that still runs has arrived.
void barrier(int line);

// Exchanges 64 bits with another lane of the warp: returns what `source` gave. Blocks until all lanes of `mask` arrive.
uint64_t exchange(unsigned mask, uint64_t bits, int source_lane, int line);

// Returns one bit a lane of `mask`: whether it passed true. Blocks until all lanes of `mask` arrive.
unsigned ballot(unsigned mask, bool predicate, int line);

int lane();

// An atomic update of memory: races with plain accesses only.
void atomic_access(const void* address, int bytes);

// Whether a fault that was put into the kernels is switched on.
bool has_fault(int number);

// Ends the launch with an error.
[[noreturn]] void fail(const char* message);

// Lets kernels access a stretch of memory; until the next call of the op.
void allow(const void* begin, int64_t bytes);

struct Configuration {
  const char* kernel;
  Dim3 grid, block;
};

void run(const Configuration& configuration, void (*thread)(const void*), const void* arguments);

template <class Kernel>
struct Launch {
  Configuration configuration;
  Kernel kernel;

  template <class... Arguments>
  void operator()(Arguments... arguments) const {
    // Every thread gets a copy of the arguments on its stack, as on a device.
    const auto thread = [&] { kernel(arguments...); };
    run(configuration, [](const void* body) { (*static_cast<const decltype(thread)*>(body))(); }, &thread);
  }
};

template <class Kernel>
Launch<Kernel> launch(const char* name, Kernel kernel, unsigned grid, unsigned block, std::size_t shared, const void*) {
  if (shared != 0) fail("dynamic shared memory is not emulated");
  return {{name, {grid, 1, 1}, {block, 1, 1}}, kernel};
}

template <class T>
T shuffle_xor(unsigned mask, T value, int lanes, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, lane() ^ lanes, line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
T atomic_or(T* address, T value) {
  atomic_access(address, sizeof(T));
  return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}

}  // namespace emulated
