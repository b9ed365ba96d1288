// What attends for one sequence and key/value head (paged_attention.cpp), for decode_step.cpp.

#pragma once

#include <cstdint>

namespace moe_serve {

struct Shape {
    int64_t groups;        // G, query heads per KV head, or some of them
    int64_t key_dim;       // D
    int64_t value_dim;     // Dv
    int64_t value_stride;  // Dv, or D where values are the beginnings of keys
    int64_t page_size;     // B
};

// Heads that share a KV head and read its keys together; more are work for another thread.
constexpr int64_t HEADS_AT_ONCE = 8;

// query [G, D]; keys [tokens, D], values [tokens, Dv] of the KV head; pages [ceil(length / B)]; tokens `first` to
// `length`-1 are visible; sinks [G] or null; out [G, Dv]; score: room for G * (length - first). What a head gets does
// not depend on how many there are.
using Attend = void (*)(const float* query, const float* keys, const float* values, const int64_t* pages, int64_t first,
                        int64_t length, float scale, const float* sinks, float* out, const Shape& shape, float* score);

// The fastest on this processor for such heads.
Attend choose_attend(int64_t key_dim, int64_t value_dim);

}  // namespace moe_serve
