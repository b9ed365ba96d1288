// A decoding step of a few sequences as one call: all layers, or one layer's part before its experts.
//
//   for each layer:
//     q, k, v = rows of [q; k; v] @ norm(x)                     rows split over threads, then a barrier
//     per token and KV head: norms of heads, rotation, key and value into their page, attention        barrier
//     x += o @ attended                                                                                barrier
//     scores = router @ norm(x), top k                                                                 barrier
//     inner = activation(gate, up) of the chosen experts                                               barrier
//     x += weighted sum of down @ inner                                                                barrier
//   logits = head @ norm(x)
//
// With one token a model's layers are short: starting threads, or asking Python what comes next, takes as long as
// reading a layer's weights. So one team of threads stays awake for the whole step, and what every thread needs and
// is cheaper to compute than to wait for (norms, order of inputs, choice of experts) each thread computes itself.
// (llama.cpp's graphs do as much on CPUs, CUDA graphs on GPUs.) Plain C ABI, no libtorch.
//
// Shape alphabet: T tokens, one per sequence; H hidden, Hq query and Hk key/value heads of D, E experts, K choices,
// I intermediate, V vocabulary.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include <omp.h>

#include "paged_attention.h"
#include "segments.h"

namespace moe_serve {

enum ScoreKind { SOFTMAX, SOFTMAX_OF_CHOSEN };

// One decoder layer: decode_step.py fills these in. Linear layers are experts that have only `down`.
struct Block {
    const Expert *q, *k, *v, *o, *router;
    const float *input_norm, *post_norm;  // [H]
    const float *q_norm, *k_norm;         // null: none; [D], or [Hq * D] and [Hk * D] where `norms_all_heads`
    const float* sinks;                   // [Hq] or null
    int64_t window;                       // 0: none
    float *keys, *values;                 // [Hk, kv_tokens, D]
    const Expert* const* experts;         // [E]; null where somebody else runs them
};

struct Model {
    const Block* blocks;
    int64_t num_blocks;
    const float* final_norm;
    const Expert* head;
    int64_t hidden, heads, kv_heads, head_dim, num_experts, top_k;
    int64_t kv_tokens, page_size;
    int64_t norms_all_heads;
    int64_t score_kind, renormalize;
    int64_t activation;
    double activation_alpha, activation_limit;
    double norm_eps, attention_scale, routing_scale;
    int64_t intermediate, scratch;  // what Memory has to know of the weights: moe_serve_decode_memory fills these in
};

struct Step {
    int64_t num_tokens;
    const float *cos, *sin;     // [T, D / 2]
    const int64_t* kv_slots;    // [T] where in keys and values the token's own belong
    const int64_t* page_table;  // [T, table_width]
    const int64_t* lengths;     // [T], own token included
    int64_t table_width;
    float* x;                   // [T, H], in and out
    float* normed;              // [T, H] what the last block's experts are given
    int64_t* ids;               // [blocks, T, K]
    float* weights;             // [blocks, T, K]
    float* logits;              // [T, V]
};

inline int64_t largest_width(const Model& model) { return std::max(model.hidden, model.heads * model.head_dim); }

constexpr int64_t MOST_GRAIN = 128;  // columns that rows of Tokens are filled up to, whatever the weights' format

// Memory of one step, in floats from one allocation. Shared by all threads first, then each thread's own.
struct Memory {
    float *q, *k, *v, *attended, *products, *scores, *inputs, *inners, *threads;
    int64_t input_stride, inner_stride, thread_stride, scratch;

    Memory(const Model& model, int64_t num_tokens, float* base) {
        const int64_t pairs = num_tokens * model.top_k;
        input_stride = round_up(largest_width(model), MOST_GRAIN);
        inner_stride = round_up(model.intermediate, MOST_GRAIN);
        scratch = round_up(model.scratch, 16);
        float* next = base;
        const auto take = [&](int64_t count) { return std::exchange(next, next + round_up(count, 16)); };
        q = take(num_tokens * model.heads * model.head_dim);
        k = take(num_tokens * model.kv_heads * model.head_dim);
        v = take(num_tokens * model.kv_heads * model.head_dim);
        attended = take(num_tokens * model.heads * model.head_dim);
        products = take(pairs * model.hidden);
        scores = take(num_tokens * model.num_experts);
        inputs = take(pairs * input_stride);
        inners = take(pairs * inner_stride);
        threads = next;
        thread_stride = scratch + round_up(num_tokens * model.hidden, 16) + num_tokens * input_stride +
                        round_up((model.heads / model.kv_heads + 1) * model.head_dim, 16);
    }

    int64_t size(int64_t num_threads, const float* base) const { return threads - base + num_threads * thread_stride; }
};

inline int64_t scratch_of(const Expert* expert, int64_t num_tokens) {
    const Segment segment = plan({expert, 0, num_tokens});
    return segment.steps.scratch(segment);
}

// Rows of `inner` and scratch memory that the experts need; those of one expert, as all of a model are alike.
struct Needs {
    int64_t intermediate = 0, scratch = 0;

    Needs(const Model& model, int64_t num_tokens) {
        const auto cover = [&](const Expert* expert) {
            if (expert) scratch = std::max(scratch, scratch_of(expert, num_tokens));
        };
        for (int64_t i = 0; i < model.num_blocks; ++i) {
            const Block& block = model.blocks[i];
            for (const Expert* linear : {block.q, block.k, block.v, block.o, block.router}) cover(linear);
            if (!block.experts) continue;
            cover(block.experts[0]);
            intermediate = std::max(intermediate, block.experts[0]->gate.rows);
        }
        cover(model.head);
    }
};

// Multiplications of a layer that take as long as waking a second thread.
constexpr int64_t ALONE = 1 << 18;

inline bool is_worth_threads(const Model& model) {
    return model.hidden * (model.heads + model.kv_heads) * model.head_dim * 2 > ALONE;
}

}  // namespace moe_serve

using namespace moe_serve;

#define ARITHMETIC "decode_step.inc"
#include "per_isa.inc"

// Floats that the other functions need as `memory` for at most `num_tokens` tokens and so many threads.
extern "C" int64_t moe_serve_decode_memory(Model* model, int64_t num_tokens, int32_t num_threads) {
    const Needs needs(*model, num_tokens);
    model->intermediate = needs.intermediate;
    model->scratch = needs.scratch;
    return Memory(*model, num_tokens, nullptr).size(num_threads, nullptr);
}

// The whole step: x, ids and weights of every block, and logits. Every block has its experts.
extern "C" void moe_serve_decode_step(const Model* model, const Step* step, float* memory, int32_t num_threads) {
    const Memory areas(*model, step->num_tokens, memory);
#pragma omp parallel num_threads(num_threads) if (is_worth_threads(*model))
    FOR_THIS_CPU(run_step)(*model, *step, areas);
}

// One block up to its experts: x, normed, and ids and weights of this block. What they give is added to x by others.
extern "C" void moe_serve_decode_attention(const Model* model, const Step* step, int64_t block, float* memory,
                                           int32_t num_threads) {
    const Memory areas(*model, step->num_tokens, memory);
#pragma omp parallel num_threads(num_threads) if (is_worth_threads(*model))
    FOR_THIS_CPU(run_attention)(*model, *step, areas, block);
}

// Logits of x.
extern "C" void moe_serve_decode_head(const Model* model, const Step* step, float* memory, int32_t num_threads) {
    const Memory areas(*model, step->num_tokens, memory);
#pragma omp parallel num_threads(num_threads) if (is_worth_threads(*model))
    FOR_THIS_CPU(run_head)(*model, *step, areas);
}
