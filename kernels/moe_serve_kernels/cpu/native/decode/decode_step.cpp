// A decoding step of a few sequences as one call: all layers, or one layer's part before its experts.
//
//   for each layer:
//     q, k, v = rows of [q; k; v] @ norm(x)                     rows split over threads, then a barrier
//     per token and KV head: norms of heads, rotation, key and value into their page, attention        barrier
//     x += o @ attended                                                                                barrier
//     scores = router @ norm(x), top k                                                                 barrier
//     inner = activation(gate, up) of the shared expert and the chosen ones                            barrier
//     x += shared + weighted sum of down @ inner                                                       barrier
//   logits = head @ norm(x)
//
// A layer without experts has no router, and its MLP is in the place of the shared expert. Latent attention
// (DeepSeek-V2) caches one narrow row per token that all heads share. Their keys and values, which would be products of
// that row, are never made: a head's query is carried over to the row's space, and what it attends to back.
//
// With one token a model's layers are short: starting threads, or asking Python what comes next, takes as long as
// reading a layer's weights. So one team of threads stays awake for the whole step, and what every thread needs and
// is cheaper to compute than to wait for (norms, order of inputs, choice of experts) each thread computes itself.
// (llama.cpp's graphs do as much on CPUs, CUDA graphs on GPUs.) Plain C ABI, no libtorch.
//
// Shape alphabet: T tokens, one per sequence; H hidden, Hq query and Hk key/value heads of D, E experts, K choices,
// I intermediate, V vocabulary; D is the width of queries and keys, Dv of values, R of rotary values.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include <omp.h>

#include "attention/paged_attention.h"
#include "contract/api.h"
#include "experts/segments.h"

namespace moe_serve {

constexpr int SIDE_BY_SIDE = 3;  // linear layers on the same tokens, each of a format of its own at worst

// Floats of a row of Tokens, whatever the weights' format: filled up to 128 columns, which may be 3 bf16 numbers each.
inline int64_t most_stride(int64_t columns) { return round_up(columns, 128) / 2 * 3; }

// Memory of one step, in floats from one allocation. Shared by all threads first, then each thread's own.
struct Memory {
    float *q, *k, *v, *q_latent, *kv_latent, *attended, *products, *scores, *inputs, *inners, *shared_inners, *threads;
    int64_t input_stride, inner_stride, thread_stride, scratch;

    Memory(const Model& model, int64_t num_tokens, float* base) {
        const int64_t pairs = num_tokens * (model.top_k + 1);  // the shared expert's come last
        const Sizes& sizes = model.sizes;
        input_stride = most_stride(sizes.width);
        inner_stride = most_stride(sizes.intermediate);
        scratch = round_up(sizes.scratch, 16);
        float* next = base;
        const auto take = [&](int64_t count) { return std::exchange(next, next + round_up(count, 16)); };
        q = take(num_tokens * model.heads * model.head_dim);
        k = take(num_tokens * sizes.kv);
        v = take(num_tokens * sizes.kv);
        q_latent = take(num_tokens * sizes.q_latent);
        kv_latent = take(num_tokens * sizes.kv_latent);
        attended = take(num_tokens * model.heads * model.value_dim);
        products = take(pairs * model.hidden);
        scores = take(num_tokens * model.num_experts);
        inputs = take(pairs * input_stride);
        inners = take(num_tokens * model.top_k * inner_stride);
        shared_inners = take(num_tokens * most_stride(sizes.shared_intermediate));
        threads = next;
        thread_stride = scratch + round_up(num_tokens * sizes.width, 16) + SIDE_BY_SIDE * num_tokens * input_stride +
                        heads_size(model, num_tokens) + attend_size(model) +
                        round_up(model.num_experts + model.num_groups, 16);
    }

    // Queries of heads that share keys; with latents those of all tokens, and what they attend to.
    static int64_t heads_size(const Model& model, int64_t num_tokens) {
        const int64_t latents = 2 * HEADS_AT_ONCE * num_tokens * round_up(model.sizes.kv_latent, 16);
        return std::max(latents, std::min(model.heads / model.kv_heads, MOST_ROWS) * round_up(model.head_dim, 16));
    }

    static int64_t attend_size(const Model& model) {
        Shape widest{};
        widest.key_dim = std::max(model.head_dim, model.sizes.kv_latent);
        widest.value_dim = std::max(model.value_dim, model.sizes.kv_latent);
        return round_up(attend_memory(widest), 16);
    }

    int64_t size(int64_t num_threads, const float* base) const { return threads - base + num_threads * thread_stride; }
};

inline int64_t scratch_of(const Expert* expert, int64_t num_tokens) {
    const Segment segment = plan({expert, 0, num_tokens});
    return segment.steps.scratch(segment);
}

inline int64_t rows_of(const Expert* linear) { return linear ? linear->down.rows : 0; }

inline void cover(Sizes& sizes, const Block& block, int64_t num_tokens) {
    const auto grow = [](int64_t& size, int64_t least) { size = std::max(size, least); };
    const Expert* into = block.into_latents ? block.into_latents[0] : nullptr;
    const Expert* from = block.from_latents ? block.from_latents[0] : nullptr;
    for (const Expert* linear : {block.q, block.k, block.v, block.o, block.q_latent, block.kv_latent, into, from,
                                 block.router, block.shared_gate}) {
        if (!linear) continue;
        grow(sizes.width, linear->down.columns);
        grow(sizes.scratch, scratch_of(linear, num_tokens));
    }
    grow(sizes.kv, rows_of(block.k));
    grow(sizes.q_latent, rows_of(block.q_latent));
    grow(sizes.kv_latent, rows_of(block.kv_latent));
    if (block.shared) {
        grow(sizes.shared_intermediate, block.shared->gate.rows);
        grow(sizes.scratch, scratch_of(block.shared, num_tokens));
    }
    if (block.experts) {  // all of a model are alike
        grow(sizes.intermediate, block.experts[0]->gate.rows);
        grow(sizes.scratch, scratch_of(block.experts[0], num_tokens));
    }
}

inline Sizes sizes_of(const Model& model, int64_t num_tokens) {
    Sizes sizes{};
    for (int64_t i = 0; i < model.num_blocks; ++i) cover(sizes, model.blocks[i], num_tokens);
    sizes.scratch = std::max(sizes.scratch, scratch_of(model.head, num_tokens));
    return sizes;
}

// Multiplications of a layer that take as long as waking a second thread.
constexpr int64_t ALONE = 1 << 18;

inline bool is_worth_threads(const Model& model) {
    return model.hidden * (model.heads + model.kv_heads) * model.head_dim * 2 > ALONE;
}

}  // namespace moe_serve

using namespace moe_serve;

#define ARITHMETIC "decode/decode_step.inc"
#include "simd/per_isa.inc"

// Floats that the other functions need as `memory` for at most `num_tokens` tokens and the given number of threads.
extern "C" int64_t moe_serve_decode_memory(Model* model, int64_t num_tokens, int32_t num_threads) {
    model->sizes = sizes_of(*model, num_tokens);
    return Memory(*model, num_tokens, nullptr).size(num_threads, nullptr);
}

// The whole step: x, ids and weights of every block with a router, and logits. All of these have their experts.
extern "C" void moe_serve_decode_step(const Model* model, const Step* step, float* memory, int32_t num_threads) {
    const Memory areas(*model, step->num_tokens, memory);
#pragma omp parallel num_threads(num_threads) if (is_worth_threads(*model))
    FOR_THIS_CPU(run_step)(*model, *step, areas);
}

// One block up to its experts: x, and if it has a router, normed, ids and weights; without one x is complete. The
// experts' part is added to x by others, after the shared expert's by moe_serve_decode_shared.
extern "C" void moe_serve_decode_until_experts(const Model* model, const Step* step, int64_t block, float* memory,
                                               int32_t num_threads) {
    const Memory areas(*model, step->num_tokens, memory);
#pragma omp parallel num_threads(num_threads) if (is_worth_threads(*model))
    FOR_THIS_CPU(run_until_experts)(*model, *step, areas, block);
}

// The shared expert of a block that has a router: x.
extern "C" void moe_serve_decode_shared(const Model* model, const Step* step, int64_t block, float* memory,
                                        int32_t num_threads) {
    const Memory areas(*model, step->num_tokens, memory);
#pragma omp parallel num_threads(num_threads) if (is_worth_threads(*model))
    FOR_THIS_CPU(run_shared)(*model, *step, areas, block);
}

// Logits of x.
extern "C" void moe_serve_decode_head(const Model* model, const Step* step, float* memory, int32_t num_threads) {
    const Memory areas(*model, step->num_tokens, memory);
#pragma omp parallel num_threads(num_threads) if (is_worth_threads(*model))
    FOR_THIS_CPU(run_head)(*model, *step, areas);
}

// Rows of x [rows, columns] with their RMSNorm.
extern "C" void moe_serve_norm(const float* x, const float* weight, double eps, int64_t rows, int64_t columns,
                               float* out, int32_t num_threads) {
#pragma omp parallel num_threads(num_threads) if (rows * columns > ALONE)
    FOR_THIS_CPU(norm_rows)(x, weight, eps, rows, columns, out);
}

// A block's attention for any number of tokens, between its linear layers; see decode/many.inc.
extern "C" void moe_serve_attend(const Model* model, const Step* step, int64_t block, const float* q, const float* k,
                                 const float* v, float* attended, int32_t num_threads) {
#pragma omp parallel num_threads(num_threads)
    FOR_THIS_CPU(attend_many)(*model, model->blocks[block], *step, q, k, v, attended);
}

extern "C" void moe_serve_write_latents(const Model* model, const Step* step, int64_t block, const float* kv,
                                        int32_t num_threads) {
#pragma omp parallel num_threads(num_threads)
    FOR_THIS_CPU(write_many_latents)(*model, model->blocks[block], *step, kv);
}

extern "C" void moe_serve_attend_to_latents(const Model* model, const Step* step, int64_t block, const float* q,
                                            const float* carried, float* out, int32_t num_threads) {
#pragma omp parallel num_threads(num_threads)
    FOR_THIS_CPU(attend_many_to_latents)(*model, model->blocks[block], *step, q, carried, out);
}

// A block's choice of experts from its router's scores [T, E].
extern "C" void moe_serve_route(const Model* model, int64_t block, int64_t num_tokens, const float* scores,
                                int64_t* ids, float* weights, int32_t num_threads) {
#pragma omp parallel num_threads(num_threads) if (num_tokens * model -> num_experts > ALONE / 16)
    FOR_THIS_CPU(route_many)(*model, model->blocks[block], num_tokens, scores, ids, weights);
}

// scores [count] become their sigmoids.
extern "C" void moe_serve_probabilities(int64_t count, float* scores, int32_t num_threads) {
#pragma omp parallel num_threads(num_threads) if (count > ALONE / 16)
    FOR_THIS_CPU(probabilities)(count, scores);
}
