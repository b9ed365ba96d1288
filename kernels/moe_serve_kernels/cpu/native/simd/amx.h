// AMX: tiles of 16 rows of 64 bytes, and their products in bf16 with float32 sums. The macros are the instructions; tile
// numbers are literals.

#pragma once

#include "simd/vectors.h"

#ifdef X86_VERSIONS

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TILE_LOAD(tile, from, stride) \
    asm volatile("tileloadd (%0,%1,1), %%tmm" #tile::"r"(from), "r"(static_cast<int64_t>(stride)) : "memory")
#define TILE_STORE(tile, to, stride) \
    asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"(static_cast<int64_t>(stride)) : "memory")
#define TILE_ZERO(tile) asm volatile("tilezero %%tmm" #tile::)
// sums [16, n] += left [16, 32] @ right, whose [32, n] values lie in pairs of rows: [16, n, 2].
#define TILE_MULTIPLY(sums, left, right) asm volatile("tdpbf16ps %%tmm" #right ", %%tmm" #left ", %%tmm" #sums::)
#define TILE_RELEASE() asm volatile("tilerelease" ::: "memory")

namespace moe_serve {

// Shapes of the eight tiles: 16 rows of so many bytes each.
inline void configure_tiles(const int64_t (&row_bytes)[8]) {
    struct {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    } config;
    static_assert(sizeof(config) == 64);
    for (int tile = 0; tile < 8; ++tile) {
        config.rows[tile] = 16;
        config.row_bytes[tile] = static_cast<uint16_t>(row_bytes[tile]);
    }
    asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
}

// Whether tiles multiply as they should: products of small integers are exact.
inline bool check_tiles() {
    alignas(64) uint16_t left[16][32], right[16][16][2];
    alignas(64) float sums[16][16];
    const auto bf16 = [](int value) {
        const float number = static_cast<float>(value);
        uint32_t bits;
        std::memcpy(&bits, &number, sizeof(bits));
        return static_cast<uint16_t>(bits >> 16);
    };
    const auto left_at = [](int row, int k) { return (row * 7 + k * 3) % 11 - 5; };
    const auto right_at = [](int k, int column) { return (k * 5 + column) % 13 - 6; };
    for (int i = 0; i < 512; ++i) {
        left[i / 32][i % 32] = bf16(left_at(i / 32, i % 32));
        right[i / 32][i / 2 % 16][i % 2] = bf16(right_at(i / 32 * 2 + i % 2, i / 2 % 16));
    }
    configure_tiles({64, 64, 64, 64, 64, 64, 64, 64});
    TILE_ZERO(0);
    TILE_LOAD(4, left, 64);
    TILE_LOAD(6, right, 64);
    TILE_MULTIPLY(0, 4, 6);
    TILE_STORE(0, sums, 64);
    TILE_RELEASE();
    for (int i = 0; i < 256; ++i) {
        int expected = 0;
        for (int k = 0; k < 32; ++k) expected += left_at(i / 16, k) * right_at(k, i % 16);
        if (sums[i / 16][i % 16] != static_cast<float>(expected)) return false;
    }
    return true;
}

// The processor has tiles for bf16, and the kernel lets this process use them.
inline bool has_amx() {
    static const bool found = [] {
        constexpr unsigned BF16 = 1u << 22, TILES = 1u << 24;
        constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        unsigned a, b, c, d;
        if (most_isa() < AMX || !has_avx512() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
        if ((d & (BF16 | TILES)) != (BF16 | TILES)) return false;
        return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0 && check_tiles();
    }();
    return found;
}

}  // namespace moe_serve

#endif
