#pragma once

#include <bit>
#include <cstdint>

#include "emulator.h"

// The part of CUDA C++ that the kernels use, for a host compiler.
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("emulated_shared")))

#define threadIdx (::emulated::here().thread)
#define blockIdx (::emulated::here().block)
#define blockDim (::emulated::here().block_size)
#define gridDim (::emulated::here().grid_size)

#define __syncthreads() ::emulated::barrier(__LINE__)
#define __shfl_xor_sync(mask, value, lanes) ::emulated::shuffle_xor(mask, value, lanes, __LINE__)
#define __ballot_sync(mask, predicate) ::emulated::ballot(mask, predicate, __LINE__)
#define atomicOr(address, value) ::emulated::atomic_or(address, static_cast<unsigned long long>(value))
#define __popcll(word) std::popcount(static_cast<uint64_t>(word))

using cudaStream_t = const void*;
