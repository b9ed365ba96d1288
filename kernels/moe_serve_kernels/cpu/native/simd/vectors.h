// Sixteen-lane vectors for all kernels, and the list of instruction sets each kernel is compiled for.
//
// A kernel file puts its arithmetic into an .inc file and includes it once per instruction set:
// intrinsics-free C++ on vector types, which the compiler maps to the registers at hand.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

// In registers: one with AVX-512, two with AVX2, four with SSE.
typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t VecMask __attribute__((vector_size(64)));
// In memory, at any address its elements may have.
typedef float Vec __attribute__((vector_size(64), aligned(4)));
typedef uint32_t VecBits __attribute__((vector_size(64), aligned(2)));

// MOE_SERVE_MAX_CPU_ISA=avx512, avx2 or generic: no better instructions than these, for tests and for comparisons
// (oneDNN's ONEDNN_MAX_CPU_ISA). Read once.
enum Isa { GENERIC, AVX2, AVX512, AMX };

inline Isa most_isa() {
    static const Isa most = [] {
        const char* wanted = std::getenv("MOE_SERVE_MAX_CPU_ISA");
        if (!wanted) return AMX;
        if (!std::strcmp(wanted, "generic")) return GENERIC;
        return !std::strcmp(wanted, "avx2") ? AVX2 : !std::strcmp(wanted, "avx512") ? AVX512 : AMX;
    }();
    return most;
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define X86_VERSIONS 1

inline bool has_avx512() {
    return most_isa() >= AVX512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
}

inline bool has_avx2() { return most_isa() >= AVX2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif
