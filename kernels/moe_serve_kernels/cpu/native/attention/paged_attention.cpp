// Paged attention, float32 on keys and values in float32 or bf16: keys and values are read straight from their pages, nothing is gathered first.
//
//   for each sequence, KV head and block of its queries:                 (a task; they run in parallel)
//     for each part of the context:
//       score[r][t] = scale * query[r] . key[t]                          r: a token and one of its G heads
//       weight, total = softmax so far, with the head's sink at last where there is one
//       sum[r] += weight[r][t] * value[t]
//     out[r] = sum[r] / total[r]
//
// The tokens of one head in one page are contiguous, [B, D]. With latents (DeepSeek-V2) there is one KV head, and a
// token's value is the beginning of its key. Plain C ABI, no libtorch: fits any torch version.

#include "attention/paged_attention.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "contract/api.h"
#include "experts/segments.h"
#include "simd/vectors.h"

using namespace moe_serve;

namespace {

constexpr int64_t PART =
    128;  // tokens of the context at a time: a head's keys and values stay in the second-level cache

int64_t round_up(int64_t columns) { return moe_serve::round_up(columns, 16); }

}  // namespace

#define ARITHMETIC "attention/paged_attention.inc"
#include "simd/per_isa.inc"

Attend moe_serve::choose_attend(bool bf16) {
    return bf16 ? FOR_THIS_CPU(attend<uint16_t>) : FOR_THIS_CPU(attend<float>);
}

int64_t moe_serve::attend_memory(const Shape& shape) {
    return MOST_ROWS * (PART + ::round_up(shape.value_dim)) + 16 * ::round_up(shape.key_dim);
}

namespace {

struct Batch {
    const float* query;
    const float *keys, *values;
    const int64_t* pages;
    const int64_t* lengths;
    const float* sinks;
    float* out;
    int64_t kv_heads, tokens, table_width;

    // Heads `first` to `first` + G - 1 of sequence n, which share KV head h; `memory` also has their queries.
    void attend(int64_t n, int64_t h, int64_t first, const Shape& shape, int64_t heads, float* memory) const {
        const int64_t row = n * heads + first, stride = ::round_up(shape.key_dim);
        float* rows = memory + attend_memory(shape);
        std::fill_n(rows, shape.groups * stride, 0.0f);
        for (int64_t g = 0; g < shape.groups; ++g) {
            std::copy_n(query + (row + g) * shape.key_dim, shape.key_dim, rows + g * stride);
        }
        const Queries queries{
            rows, stride,         1, lengths[n], sinks ? sinks + first : nullptr, out + row * shape.value_dim,
            0,    shape.value_dim};
        const Context own{keys + h * tokens * shape.key_dim, values + h * tokens * shape.value_stride,
                          pages + n * table_width};
        choose_attend(false)(queries, own, shape, memory);
    }
};

}  // namespace

// query [N, Hk*G, D]; keys [Hk, tokens, D]; values [Hk, tokens, Dv], `value_stride` from token to token;
// page_table [N, table_width] int64; lengths [N] int64; sinks [Hk*G] or null; out [N, Hk*G, Dv]. window <= 0: none.
extern "C" void moe_serve_paged_decode_f32(const float* query, const float* keys, const float* values,
                                           const int64_t* page_table, const int64_t* lengths, const float* sinks,
                                           float* out, int64_t num_seqs, int64_t kv_heads, int64_t groups,
                                           int64_t key_dim, int64_t value_dim, int64_t value_stride, int64_t tokens,
                                           int64_t page_size, int64_t table_width, float scale, int64_t window,
                                           int32_t num_threads) {
    const Batch batch{query, keys, values, page_table, lengths, sinks, out, kv_heads, tokens, table_width};
    const Shape shape{groups, key_dim, value_dim, value_stride, page_size, window, scale};
    const int64_t parts = (groups + HEADS_AT_ONCE - 1) / HEADS_AT_ONCE;
#pragma omp parallel num_threads(num_threads)
    {
        const auto memory = allocate(attend_memory(shape) + HEADS_AT_ONCE * ::round_up(key_dim));
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < num_seqs * kv_heads * parts; ++task) {
            const int64_t n = task / (kv_heads * parts), h = task / parts % kv_heads;
            const int64_t first = h * groups + task % parts * HEADS_AT_ONCE;
            Shape part = shape;
            part.groups = std::min((h + 1) * groups - first, HEADS_AT_ONCE);
            batch.attend(n, h, first, part, kv_heads * groups, memory.get());
        }
    }
}
