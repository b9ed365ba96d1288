// What a decoding step is given: decode_step.py fills these in, by the names that contract/layout.cpp tells it.

#pragma once

#include <cstdint>

#include "experts/segments.h"

namespace moe_serve {

constexpr int64_t MOST_CHOICES = 64;  // experts of a token

enum ScoreKind { SOFTMAX, SIGMOID, SOFTMAX_OF_CHOSEN };
enum RotaryKind { HALVES, NEIGHBOURS, NEIGHBOURS_TO_HALVES };

// One decoder layer. Linear layers are experts that have only `down`.
struct Block {
    const Expert *q, *k, *v, *o;        // k and v null: latent attention
    const Expert* q_latent;             // q's input, or null: q takes what the layer is given
    const Expert* kv_latent;            // [rank + R, H]: the latents, and the keys' rotary values
    const Expert* const* into_latents;  // [Hq] of [rank, D - R]: what makes queries of latents
    const Expert* const* from_latents;  // [Hq] of [Dv, rank]: what makes values of latents
    const float *q_latent_norm, *kv_latent_norm;
    const Expert* router;                 // null: no experts
    const float* correction;              // [E] added to what experts are chosen by, or null
    const Expert* shared;                 // what every token goes through beside its experts, or null
    const Expert* shared_gate;            // [1, H] whose sigmoid the shared expert is multiplied by, or null
    const float *input_norm, *post_norm;  // [H]
    const float *q_norm, *k_norm;         // null: none; [D], or [Hq * D] and [Hk * D] where `norms_all_heads`
    const float* sinks;                   // [Hq] or null
    int64_t window;                       // 0: none
    void *keys, *values;                  // [Hk, kv_tokens, D], [Hk, kv_tokens, Dv]; or [kv_tokens, rank + R], null
    int64_t kv_bf16;                      // what these are; else float32
    const Expert* const* experts;         // [E]; null: there are none, or the caller runs them
    int64_t route;                        // where in ids and weights this layer's choices go
};

// What Memory has to know of the weights.
struct Sizes {
    int64_t intermediate, shared_intermediate;  // rows of an expert's gate, of the largest shared one's
    int64_t width;                              // columns of the widest linear layer
    int64_t kv, q_latent, kv_latent;            // rows of k, and of the others
    int64_t scratch;
};

struct Model {
    const Block* blocks;
    int64_t num_blocks;
    const float* final_norm;
    const Expert* head;
    int64_t hidden, heads, kv_heads, head_dim, value_dim, num_experts, top_k;
    int64_t kv_tokens, page_size;
    int64_t norms_all_heads;
    int64_t rotary_dim, rotary_kind;
    int64_t score_kind, renormalize, num_groups, top_groups, best_of_group;
    int64_t activation;
    double activation_alpha, activation_limit;
    double norm_eps, latent_norm_eps, attention_scale, routing_scale, residual_scale;
    Sizes sizes;  // moe_serve_decode_memory fills them in
};

struct Step {
    int64_t num_tokens;
    const float *cos, *sin;     // [T, rotary_dim / 2]
    const int64_t* kv_slots;    // [T] where in keys and values the token's own belong
    const int64_t* starts;      // [S + 1] where each sequence's tokens begin, and T; null: each token is a sequence
    const int64_t* page_table;  // [S, table_width]
    const int64_t* lengths;     // [T], own token included
    int64_t num_sequences, table_width;
    float* x;        // [T, H], in and out
    float* normed;   // [T, H] what the last block's experts are given
    int64_t* ids;    // [blocks with a router, T, K]
    float* weights;  // the same
    float* logits;   // [T, V]
};

}  // namespace moe_serve
