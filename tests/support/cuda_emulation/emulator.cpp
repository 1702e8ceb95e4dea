// The scheduler and the memory checker behind include/emulator.h. The kernels are compiled with -fsanitize=thread, whose
// callbacks (__tsan_read4 and so on) are defined here instead of in the sanitizer's run time.
#include "emulator.h"

#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

extern "C" char __start_emulated_shared[] __attribute__((weak));
extern "C" char __stop_emulated_shared[] __attribute__((weak));

namespace emulated {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 * 1024;

enum class State { kReady, kAtBarrier, kInWarp, kDone };

struct Fiber {
  ucontext_t context;
  char* stack = nullptr;
  Position position;
  unsigned index = 0;
  State state = State::kReady;
  int line = 0;
  uint64_t awaited = 0;  // round of its warp
};

struct Warp {
  unsigned arrived = 0, mask = 0;
  int line = 0;
  uint64_t round = 0;
  uint64_t given[kWarp], results[kWarp];
};

// The thread that accessed a byte.
struct Access {
  uint32_t launch = 0, block = 0, thread = 0, epoch = 0;
  bool atomic = false;
};

struct Cell {
  Access write, read, other_read;
};

struct Stretch {
  uintptr_t end;
  std::vector<Cell> cells;
};

struct Machine {
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::map<uintptr_t, Stretch> memory;  // by its begin
  std::vector<std::pair<uintptr_t, uintptr_t>> constants;
  Fiber* running = nullptr;
  void (*thread)(const void*) = nullptr;
  const void* arguments = nullptr;
  std::string error;
  const char* kernel = "";
  uint32_t launch = 0, block = 0, epoch = 0;
  uint32_t seed = 0;
  int fault = 0;
  uintptr_t host = 0;  // where the host's stack was at the launch
  bool quiet = false;  // the emulator itself runs, whose accesses are not the kernel's
  uint64_t accesses = 0;
};

Machine machine;

struct Quiet {
  bool before = std::exchange(machine.quiet, true);
  ~Quiet() { machine.quiet = before; }
};

// Ends the launch. A thread stops where it is: no exception could pass the callbacks of the sanitizer.
[[noreturn]] void leave(const std::string& message) {
  if (machine.running == nullptr) throw std::runtime_error(message);
  machine.error = message;
  swapcontext(&machine.running->context, &machine.scheduler);
  std::abort();
}

std::string where() {
  const Position& at = machine.running->position;
  return "thread " + std::to_string(at.thread.x) + " of block " + std::to_string(at.block.x) + " of " + machine.kernel;
}

void yield() {
  Fiber* fiber = machine.running;
  swapcontext(&fiber->context, &machine.scheduler);
}

void enter() {
  try {
    machine.thread(machine.arguments);
  } catch (const std::exception& error) {
    const Quiet quiet;
    if (machine.error.empty()) machine.error = error.what();
  }
  machine.running->state = State::kDone;
  swapcontext(&machine.running->context, &machine.scheduler);
}

bool concurrent(const Access& earlier, const Access& now) {
  if (earlier.launch != now.launch) return false;
  return earlier.block != now.block || (earlier.thread != now.thread && earlier.epoch == now.epoch);
}

void check_race(Cell& cell, bool write, bool atomic) {
  const Access now{machine.launch, machine.block, machine.running->index, machine.epoch, atomic};
  const auto report = [&](const Access& earlier, const char* what) {
    leave("race: " + where() + (write ? " writes" : " reads") + " what thread " + std::to_string(earlier.thread) +
          " of block " + std::to_string(earlier.block) + " " + what + " without a barrier between");
  };
  if (concurrent(cell.write, now) && !(atomic && cell.write.atomic)) report(cell.write, "writes");
  if (write) {
    if (concurrent(cell.read, now) && !(atomic && cell.read.atomic)) report(cell.read, "reads");
    if (concurrent(cell.other_read, now) && !(atomic && cell.other_read.atomic)) report(cell.other_read, "reads");
    cell.write = now;
    return;
  }
  if (concurrent(cell.read, now)) cell.other_read = cell.read;
  cell.read = now;
}

bool in_constants(uintptr_t address) {
  return std::any_of(machine.constants.begin(), machine.constants.end(),
                     [&](const auto& range) { return address >= range.first && address < range.second; });
}

void access(const void* pointer, int bytes, bool write, bool atomic) {
  if (machine.running == nullptr || machine.quiet) return;  // the host's part of an op
  const Quiet quiet;
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const auto stack = reinterpret_cast<uintptr_t>(machine.running->stack);
  if (address >= stack && address < stack + kStack) return;
  ++machine.accesses;
  const auto next = machine.memory.upper_bound(address);
  if (next != machine.memory.begin()) {
    auto& [begin, stretch] = *std::prev(next);
    if (address + bytes <= stretch.end) {
      for (int i = 0; i < bytes; ++i) check_race(stretch.cells[address - begin + i], write, atomic);
      return;
    }
  }
  if (!write && in_constants(address)) return;
  // Arguments of the launch, which every thread copies, lie on the host's stack.
  if (!write && address >= machine.host && address < machine.host + (1 << 16)) return;
  leave("out of bounds: " + where() + (write ? " writes " : " reads ") + std::to_string(bytes) +
        " bytes outside of every tensor that was passed to it");
}

// The read-only segments of this library: tables that the compiler made.
int collect_constants(dl_phdr_info* info, size_t, void*) {
  const auto own = reinterpret_cast<uintptr_t>(&collect_constants);
  std::vector<std::pair<uintptr_t, uintptr_t>> ranges;
  bool ours = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type != PT_LOAD) continue;
    const uintptr_t begin = info->dlpi_addr + header.p_vaddr, end = begin + header.p_memsz;
    ours = ours || (own >= begin && own < end);
    ranges.emplace_back(begin, end);
  }
  if (ours) machine.constants = ranges;
  return ours;
}

void start(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    fiber.stack = static_cast<char*>(
        mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
  fiber.state = State::kReady;
  fiber.line = 0;
}

void release_barrier(const std::vector<Fiber*>& fibers) {
  int line = 0;
  for (Fiber* fiber : fibers) {
    if (fiber->state == State::kDone) continue;
    if (line != 0 && fiber->line != line) {
      leave(std::string("barrier: threads of ") + machine.kernel + " wait at the barriers of lines " +
            std::to_string(line) + " and " + std::to_string(fiber->line));
    }
    line = fiber->line;
  }
  for (Fiber* fiber : fibers) {
    if (fiber->state == State::kAtBarrier) fiber->state = State::kReady;
  }
  ++machine.epoch;
}

void run_block(unsigned threads, std::mt19937& random) {
  std::vector<Fiber*> order;
  for (unsigned t = 0; t < threads; ++t) order.push_back(&machine.fibers[t]);
  while (true) {
    if (machine.seed != 0) std::shuffle(order.begin(), order.end(), random);
    bool ran = false, done = true, waits = false;
    for (Fiber* fiber : order) {
      if (fiber->state == State::kReady) {
        ran = true;
        machine.running = fiber;
        swapcontext(&machine.scheduler, &fiber->context);
        machine.running = nullptr;
        machine.quiet = false;
        if (!machine.error.empty()) leave(std::exchange(machine.error, {}));
      }
      done = done && fiber->state == State::kDone;
      waits = waits || fiber->state == State::kInWarp;
    }
    if (done) return;
    const bool ready =
        std::any_of(order.begin(), order.end(), [](const Fiber* fiber) { return fiber->state == State::kReady; });
    if (ran || ready) continue;
    if (waits) leave(std::string("warp: lanes of ") + machine.kernel + " wait for lanes that do not come");
    release_barrier(order);
  }
}

// Arrives at an exchange of the warp and waits for the other lanes.
Warp& meet(unsigned mask, uint64_t bits, int line) {
  Fiber& fiber = *machine.running;
  Warp& warp = machine.warps[fiber.index / kWarp];
  const unsigned bit = 1u << lane();
  if (!(mask & bit)) {
    const Quiet quiet;
    leave("warp: " + where() + " is not in the mask of its exchange");
  }
  if (warp.arrived != 0 && (warp.mask != mask || warp.line != line)) {
    const Quiet quiet;
    leave("warp: lanes of " + std::string(machine.kernel) + " exchange at lines " + std::to_string(warp.line) + " and " +
         std::to_string(line));
  }
  warp.mask = mask;
  warp.line = line;
  warp.given[lane()] = bits;
  warp.arrived |= bit;
  if (warp.arrived != mask) {
    fiber.state = State::kInWarp;
    yield();
    return warp;
  }
  std::copy(std::begin(warp.given), std::end(warp.given), std::begin(warp.results));
  warp.arrived = 0;
  const unsigned first = fiber.index / kWarp * kWarp;
  for (int i = 0; i < kWarp; ++i) {
    Fiber& other = machine.fibers[first + i];
    if ((mask >> i & 1) && &other != &fiber) other.state = State::kReady;
  }
  return warp;
}

}  // namespace

Position here() { return machine.running->position; }

int lane() { return static_cast<int>(machine.running->index % kWarp); }

void barrier(int line) {
  machine.running->state = State::kAtBarrier;
  machine.running->line = line;
  yield();
}

uint64_t exchange(unsigned mask, uint64_t bits, int source_lane, int line) {
  if (!(mask >> source_lane & 1)) {
    const Quiet quiet;
    leave("warp: " + where() + " reads from a lane that is not in the mask");
  }
  return meet(mask, bits, line).results[source_lane];
}

unsigned ballot(unsigned mask, bool predicate, int line) {
  const Warp& warp = meet(mask, predicate, line);
  unsigned votes = 0;
  for (int i = 0; i < kWarp; ++i) {
    if (mask >> i & 1) votes |= static_cast<unsigned>(warp.results[i]) << i;
  }
  return votes;
}

bool has_fault(int number) { return machine.fault == number; }

void atomic_access(const void* address, int bytes) { access(address, bytes, true, true); }

void fail(const char* message) {
  const Quiet quiet;
  leave(message);
}

void allow(const void* begin, int64_t bytes) {
  if (bytes <= 0) return;
  const auto first = reinterpret_cast<uintptr_t>(begin);
  auto& stretch = machine.memory[first];
  const uintptr_t end = std::max(stretch.end, first + static_cast<uintptr_t>(bytes));
  stretch.end = end;
  stretch.cells.resize(end - first);
}

void run(const Configuration& configuration, void (*thread)(const void*), const void* arguments) {
  const unsigned threads = configuration.block.x, blocks = configuration.grid.x;
  if (threads == 0 || threads > 1024 || threads % kWarp != 0 || blocks == 0) {
    leave(std::string("launch: bad configuration of ") + configuration.kernel);
  }
  if (machine.constants.empty()) dl_iterate_phdr(collect_constants, nullptr);
  if (__start_emulated_shared != nullptr) allow(__start_emulated_shared, __stop_emulated_shared - __start_emulated_shared);
  if (machine.fibers.size() < threads) machine.fibers.resize(threads);
  machine.kernel = configuration.kernel;
  machine.thread = thread;
  machine.arguments = arguments;
  machine.error.clear();
  machine.host = reinterpret_cast<uintptr_t>(&threads);
  ++machine.launch;
  std::mt19937 random(machine.seed);
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  if (machine.seed != 0) std::shuffle(order.begin(), order.end(), random);
  for (const unsigned block : order) {
    machine.block = block;
    machine.epoch = 0;
    machine.warps.assign(threads / kWarp, {});
    if (__start_emulated_shared != nullptr) {  // each block has its own
      std::memset(__start_emulated_shared, 0xA5, __stop_emulated_shared - __start_emulated_shared);
      auto& cells = machine.memory[reinterpret_cast<uintptr_t>(__start_emulated_shared)].cells;
      std::fill(cells.begin(), cells.end(), Cell{});
    }
    for (unsigned t = 0; t < threads; ++t) {
      machine.fibers[t].index = t;
      machine.fibers[t].position = {{t, 0, 0}, {block, 0, 0}, configuration.block, configuration.grid};
      start(machine.fibers[t]);
    }
    run_block(threads, random);
  }
}

}  // namespace emulated

// Threads and blocks run in order for 0, in a random order otherwise.
#define EXPORTED extern "C" __attribute__((visibility("default")))
EXPORTED void emulation_seed(uint32_t seed) { emulated::machine.seed = seed; }

// Switches on a fault that was put into the kernels; 0 for none.
EXPORTED void emulation_fault(int number) { emulated::machine.fault = number; }

// Forgets the tensors that earlier calls were given.
EXPORTED void emulation_reset() { emulated::machine.memory.clear(); }

// Returns the number of checked accesses to shared and global memory.
EXPORTED uint64_t emulation_accesses() { return emulated::machine.accesses; }

#define ACCESS(size)                                                                                               \
  extern "C" void __tsan_read##size(void* address) { emulated::access(address, size, false, false); }              \
  extern "C" void __tsan_write##size(void* address) { emulated::access(address, size, true, false); }              \
  extern "C" void __tsan_unaligned_read##size(void* address) { emulated::access(address, size, false, false); }    \
  extern "C" void __tsan_unaligned_write##size(void* address) { emulated::access(address, size, true, false); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
extern "C" void __tsan_read_range(void* address, unsigned long bytes) { emulated::access(address, bytes, false, false); }
extern "C" void __tsan_write_range(void* address, unsigned long bytes) { emulated::access(address, bytes, true, false); }
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}
extern "C" void __tsan_vptr_read(void**) {}
extern "C" void __tsan_vptr_update(void**, void*) {}
#define ATOMIC(bits, type)                                                                                    \
  extern "C" type __tsan_atomic##bits##_fetch_or(volatile type* address, type value, int) {                   \
    const type before = *address;                                                                             \
    *address = before | value;                                                                                \
    return before;                                                                                            \
  }                                                                                                           \
  extern "C" type __tsan_atomic##bits##_fetch_add(volatile type* address, type value, int) {                  \
    return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);                                              \
  }                                                                                                           \
  extern "C" type __tsan_atomic##bits##_fetch_sub(volatile type* address, type value, int) {                  \
    return __atomic_fetch_sub(address, value, __ATOMIC_SEQ_CST);                                              \
  }                                                                                                           \
  extern "C" type __tsan_atomic##bits##_load(const volatile type* address, int) {                             \
    return __atomic_load_n(address, __ATOMIC_SEQ_CST);                                                        \
  }                                                                                                           \
  extern "C" void __tsan_atomic##bits##_store(volatile type* address, type value, int) {                      \
    __atomic_store_n(address, value, __ATOMIC_SEQ_CST);                                                       \
  }
ATOMIC(8, uint8_t)
ATOMIC(32, uint32_t)
ATOMIC(64, uint64_t)
