// Sixteen-lane vectors for all kernels, and the list of instruction sets each kernel is compiled for.
//
// A kernel file puts its arithmetic into an .inc file and includes it once per instruction set:
// intrinsics-free C++ on vector types, which the compiler maps to the registers at hand.

#pragma once

#include <cstdint>

// In registers: one with AVX-512, two with AVX2, four with SSE.
typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t VecMask __attribute__((vector_size(64)));
// In memory, at any address its elements may have.
typedef float Vec __attribute__((vector_size(64), aligned(4)));
typedef uint32_t VecBits __attribute__((vector_size(64), aligned(2)));

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define X86_VERSIONS 1

inline bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
}

inline bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif
