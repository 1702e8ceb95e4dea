#pragma once

#include <cstdint>

// Functions that the copies of a function share must be inlined into each of them.
#define PYFAST_XAI_INLINE inline __attribute__((always_inline))

// Defines the function `name parameters` once for each instruction set, as `name_on<Machine> arguments`, and takes the
// best copy that this CPU can run. Wheels are built without -march, so this is where AVX2, AVX-512 and fused
// multiply-adds come from. Where vectors are wider than the registers, compilers move them through the stack.
// PYFAST_XAI_ONE_TARGET compiles for the target of -march alone, since the choice always takes the best that the CPU
// runs.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(_MSC_VER) && !defined(PYFAST_XAI_ONE_TARGET)
#define PYFAST_XAI_TARGETS
#endif
#if defined(PYFAST_XAI_TARGETS) && defined(__linux__) && !defined(__clang__)
// The loader picks the copy.
#define PYFAST_XAI_ON_EACH_MACHINE(result, name, parameters, arguments)                                                \
  __attribute__((target("arch=x86-64-v4"))) result name parameters { return name##_on<pyfast_xai::Avx512> arguments; } \
  __attribute__((target("arch=x86-64-v3"))) result name parameters { return name##_on<pyfast_xai::Avx2> arguments; }   \
  __attribute__((target("default"))) result name parameters { return name##_on<pyfast_xai::Here> arguments; }
#elif defined(PYFAST_XAI_TARGETS) && defined(__clang__)
// Clang has no function versions by architecture, and not every system has a loader that picks one; a branch picks.
#define PYFAST_XAI_ON_EACH_MACHINE(result, name, parameters, arguments)                                              \
  namespace with_avx512 {                                                                                            \
  __attribute__((target("arch=x86-64-v4"), min_vector_width(512))) result name parameters {                          \
    return name##_on<pyfast_xai::Avx512> arguments;                                                                  \
  }                                                                                                                  \
  }                                                                                                                  \
  namespace with_avx2 {                                                                                              \
  __attribute__((target("arch=x86-64-v3"))) result name parameters { return name##_on<pyfast_xai::Avx2> arguments; } \
  }                                                                                                                  \
  result name parameters {                                                                                           \
    if (pyfast_xai::has_avx512()) return with_avx512::name arguments;                                                \
    if (pyfast_xai::has_avx2()) return with_avx2::name arguments;                                                    \
    return name##_on<pyfast_xai::Here> arguments;                                                                    \
  }
#else
#define PYFAST_XAI_ON_EACH_MACHINE(result, name, parameters, arguments) \
  result name parameters { return name##_on<pyfast_xai::Here> arguments; }
#endif

namespace pyfast_xai {

// The width of the vector registers of an instruction set.
struct Avx512 {
  static constexpr int kBytes = 64;
};
struct Avx2 {
  static constexpr int kBytes = 32;
};
struct Neon {
  static constexpr int kBytes = 16;
};
struct Sse2 {
  static constexpr int kBytes = 16;
};

#if defined(PYFAST_XAI_TARGETS) && defined(__clang__)
// Returns whether this CPU runs x86-64-v3, by those of its instructions that Clang 14 can query.
inline bool has_avx2() {
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  return has;
}

// Returns whether this CPU runs x86-64-v4.
inline bool has_avx512() {
  static const bool has = has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl");
  return has;
}
#endif

// The instruction set that the compiler targets everywhere.
#if defined(__AVX512F__)
using Here = Avx512;
#elif defined(__AVX2__)
using Here = Avx2;
#elif defined(__aarch64__)
using Here = Neon;
#else
using Here = Sse2;
#endif

// A register of numbers, of 32 bytes at most, and the same at any address: of a type that is packed, for Clang forgets
// how a vector type is aligned where it is the argument of a template. Never passed by value: the ABI of that depends
// on the instruction set.
template <class T, class Machine>
struct Vector {
  static constexpr int kBytes = Machine::kBytes < 32 ? Machine::kBytes : 32;
  static constexpr int64_t kLanes = kBytes / sizeof(T);
  using type __attribute__((vector_size(kBytes))) = T;
  struct __attribute__((packed, may_alias)) Anywhere {
    type all;
  };
};

template <class Machine, class T>
PYFAST_XAI_INLINE const typename Vector<T, Machine>::Anywhere* lanes(const T* values) {
  return reinterpret_cast<const typename Vector<T, Machine>::Anywhere*>(values);
}

template <class Machine, class T>
PYFAST_XAI_INLINE typename Vector<T, Machine>::Anywhere* lanes(T* values) {
  return reinterpret_cast<typename Vector<T, Machine>::Anywhere*>(values);
}

}  // namespace pyfast_xai
