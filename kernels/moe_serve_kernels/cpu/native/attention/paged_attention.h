// What attends for queries that read the same keys (paged_attention.cpp), for decode_step.cpp.

#pragma once

#include <cstdint>

namespace moe_serve {

struct Shape {
    int64_t groups;        // G, query heads of a token that share a KV head, or some of them
    int64_t key_dim;       // D
    int64_t value_dim;     // Dv
    int64_t value_stride;  // Dv, or D where values are the beginnings of keys
    int64_t page_size;     // B
    int64_t window;        // tokens that a query sees, its own included; 0: all before it
    float scale;
};

// G heads each of one or more tokens that follow each other in a sequence. The first token sees `length` tokens, itself
// included, and each one sees one more than the one before it.
struct Queries {
    const float* rows;  // [count * G, `stride`] token by token; zeros follow D up to a multiple of 16
    int64_t stride, count, length;
    const float* sinks;  // [G] or null
    float* out;          // what head g of token i gets: Dv from i * token_stride + g * head_stride on
    int64_t token_stride, head_stride;
    int64_t first = 0;  // the context before it is hidden from all of them
};

// Where a KV head's keys [tokens, D] and values [tokens, Dv] lie, and the pages of a sequence.
struct Context {
    const void *keys, *values;  // float32, or bf16
    const int64_t* pages;
};

constexpr int64_t MOST_ROWS = 128;    // count * G of one call
constexpr int64_t HEADS_AT_ONCE = 8;  // of one token; more are work for another thread

// What a row gets does not depend on how many there are. `memory`: floats for attend_memory(shape), 64-byte aligned.
using Attend = void (*)(const Queries&, const Context&, const Shape&, float* memory);

// The fastest on this processor, for keys and values in float32 or in bf16.
Attend choose_attend(bool bf16);

int64_t attend_memory(const Shape& shape);

}  // namespace moe_serve
