// Single rows of a table in ggml's blocks as floats: embedded tokens. Plain C ABI, no libtorch.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "contract/api.h"
#include "experts/segments.h"

using namespace moe_serve;

#define ARITHMETIC "experts/block_rows.inc"
#include "simd/per_isa.inc"

// `table`: an expert that has only `down`; rows [count] of it -> out [count, columns].
extern "C" void moe_serve_unpack_rows(const Expert* table, const int64_t* rows, int64_t count, float* out) {
    FOR_THIS_CPU(unpack_rows)(table->down, rows, count, out);
}
