// Paged attention for decoding, float32: one query token per sequence, keys and values read in place.
//
//   for each sequence n and key/value head h:                    (a task, or some where G is large; they run in parallel)
//     for each token t of the context, page by page:
//       score[g][t] = scale * query[n][h*G + g] . key[h][t]      (G query heads share a KV head)
//     weight = softmax(score, with the head's sink logit where there is one)
//     out[n][h*G + g] = sum_t weight[g][t] * value[h][t]
//
// Keys and values are read straight from their pages; nothing is gathered first. The tokens of one head in one page are
// contiguous, [B, D]. With latents (DeepSeek-V2) there is one KV head, and a token's value is the beginning of its key.
// Plain C ABI, no libtorch: fits any torch version.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "attention/paged_attention.h"
#include "contract/api.h"
#include "simd/vectors.h"

using namespace moe_serve;

#define ARITHMETIC "attention/paged_attention.inc"
#include "simd/per_isa.inc"

Attend moe_serve::choose_attend(int64_t key_dim, int64_t value_dim) { return FOR_THIS_CPU(choose)(key_dim, value_dim); }

namespace {

void for_each_task(Attend attend, const Shape& shape, const float* query, const float* keys, const float* values,
                   const int64_t* page_table, const int64_t* lengths, const float* sinks, float* out, int64_t num_seqs,
                   int64_t kv_heads, int64_t tokens, int64_t table_width, float scale, int64_t window,
                   int32_t num_threads) {
    const int64_t parts = (shape.groups + HEADS_AT_ONCE - 1) / HEADS_AT_ONCE;
#pragma omp parallel num_threads(num_threads)
    {
        std::vector<float> score;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < num_seqs * kv_heads * parts; ++task) {
            const int64_t n = task / (kv_heads * parts), h = task / parts % kv_heads;
            const int64_t head = h * shape.groups + task % parts * HEADS_AT_ONCE;
            Shape part = shape;
            part.groups = std::min((h + 1) * shape.groups - head, HEADS_AT_ONCE);
            const int64_t row = n * kv_heads * shape.groups + head;
            const int64_t length = lengths[n];
            const int64_t first = window > 0 && length > window ? length - window : 0;
            score.resize(static_cast<size_t>((length - first) * part.groups));
            attend(query + row * shape.key_dim, keys + h * tokens * shape.key_dim,
                   values + h * tokens * shape.value_stride, page_table + n * table_width, first, length, scale,
                   sinks ? sinks + head : nullptr, out + row * shape.value_dim, part, score.data());
        }
    }
}

}  // namespace

// query [N, Hk*G, D]; keys [Hk, tokens, D]; values [Hk, tokens, Dv], `value_stride` from token to token;
// page_table [N, table_width] int64; lengths [N] int64; sinks [Hk*G] or null; out [N, Hk*G, Dv]. window <= 0: none.
extern "C" void moe_serve_paged_decode_f32(const float* query, const float* keys, const float* values,
                                           const int64_t* page_table, const int64_t* lengths, const float* sinks,
                                           float* out, int64_t num_seqs, int64_t kv_heads, int64_t groups,
                                           int64_t key_dim, int64_t value_dim, int64_t value_stride, int64_t tokens,
                                           int64_t page_size, int64_t table_width, float scale, int64_t window,
                                           int32_t num_threads) {
    const Shape shape{groups, key_dim, value_dim, value_stride, page_size};
    for_each_task(choose_attend(key_dim, value_dim), shape, query, keys, values, page_table, lengths, sinks, out,
                  num_seqs, kv_heads, tokens, table_width, scale, window, num_threads);
}
