#pragma once

#include <cstdint>

// Compiles a function once per instruction set; the loader picks the best this CPU has. Wheels are built without
// -march, so this is where AVX2, AVX-512 and fused multiply-adds come from. With PYFAST_XAI_TARGETS a function may also
// be written once for each.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define PYFAST_XAI_TARGETS
#define PYFAST_XAI_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PYFAST_XAI_CLONES
#endif

// What clones share must be inlined into each of them.
#define PYFAST_XAI_INLINE inline __attribute__((always_inline))

namespace pyfast_xai {

// 32 bytes of numbers, at any address. Never passed by value: the ABI of that depends on the instruction set.
template <class T>
struct Vector {
  using type __attribute__((vector_size(32), aligned(alignof(T)), may_alias)) = T;
  static constexpr int64_t kLanes = 32 / sizeof(T);
};

template <class T>
PYFAST_XAI_INLINE const typename Vector<T>::type* lanes(const T* values) {
  return reinterpret_cast<const typename Vector<T>::type*>(values);
}

template <class T>
PYFAST_XAI_INLINE typename Vector<T>::type* lanes(T* values) {
  return reinterpret_cast<typename Vector<T>::type*>(values);
}

}  // namespace pyfast_xai
