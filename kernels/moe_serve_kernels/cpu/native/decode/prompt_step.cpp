// All layers of a step for any number of tokens, parts of prompts among them, in one call: what layer_parts.py does
// kernel by kernel, without asking Python what comes next. Every kernel is the one that is called there, so a token's
// bits are the same. Needs a model whose experts are all in place.
//
// Shape alphabet: T tokens, H hidden, Hq query heads of D (values of Dv), E experts, K choices, L layers with a router.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "contract/api.h"
#include "experts/segments.h"

using namespace moe_serve;

namespace {

using Floats = std::unique_ptr<float, Free>;

Floats floats(int64_t count) {
    Floats memory = allocate(std::max<int64_t>(count, 1));
    if (!memory) throw std::bad_alloc();
    return memory;
}

void check(bool has_memory) {
    if (!has_memory) throw std::bad_alloc();
}

// To the residual stream; `summand` [T, H] is scaled in place, by each token's weight where there are some. The loops
// are apart so that no compiler joins a product and a sum to one rounding.
void add(const Model& model, const Step& step, float* summand, const float* weights) {
    const float scale = static_cast<float>(model.residual_scale);
    for (int64_t t = 0; t < step.num_tokens; ++t) {
        float *row = summand + t * model.hidden, *x = step.x + t * model.hidden;
        const float factor = weights ? weights[t] * scale : scale;
        if (factor != 1.0f) {
            for (int64_t i = 0; i < model.hidden; ++i) row[i] *= factor;
        }
        asm volatile("" : : "r"(row) : "memory");
        for (int64_t i = 0; i < model.hidden; ++i) x[i] += row[i];
    }
}

class PromptStep {
public:
    PromptStep(const Model& model, const Step& step, int64_t* counts, int32_t num_threads)
        : model(model),
          step(step),
          counts(counts),
          num_threads(num_threads),
          tokens(step.num_tokens),
          normed(floats(tokens * model.hidden)),
          added(floats(tokens * model.hidden)) {}

    void run() {
        for (int64_t i = 0; i < model.num_blocks; ++i) run_block(model.blocks[i], i);
    }

private:
    const Model& model;
    const Step& step;
    int64_t* counts;
    const int32_t num_threads;
    const int64_t tokens;
    const Floats normed, added;

    void run_block(const Block& block, int64_t i) {
        norm(step.x, block.input_norm, model.norm_eps, model.hidden, normed.get());
        const Floats attended = block.kv_latent ? attend_to_latents(block, i) : attend(block, i);
        linear(block.o, attended.get(), added.get());
        add(model, step, added.get(), nullptr);
        norm(step.x, block.post_norm, model.norm_eps, model.hidden, normed.get());
        if (block.shared) add_shared(block);
        if (block.router) add_experts(block, i);
    }

    void norm(const float* x, const float* weight, double eps, int64_t columns, float* out) const {
        moe_serve_norm(x, weight, eps, tokens, columns, out, num_threads);
    }

    void linear(const Expert* layer, const float* x, float* out) const {
        check(moe_serve_linear(x, layer, out, tokens, num_threads));
    }

    Floats linear(const Expert* layer, const float* x) const {
        Floats out = floats(tokens * layer->down.rows);
        linear(layer, x, out.get());
        return out;
    }

    // [T, Hq, Dv].
    Floats attend(const Block& block, int64_t i) const {
        const Floats q = linear(block.q, normed.get()), k = linear(block.k, normed.get());
        const Floats v = linear(block.v, normed.get());
        Floats out = floats(tokens * model.heads * model.value_dim);
        moe_serve_attend(&model, &step, i, q.get(), k.get(), v.get(), out.get(), num_threads);
        return out;
    }

    // [T, Hq, Dv].
    Floats attend_to_latents(const Block& block, int64_t i) const {
        const Floats kv = linear(block.kv_latent, normed.get());
        moe_serve_write_latents(&model, &step, i, kv.get(), num_threads);
        const Floats q = queries(block);
        const int64_t rank = block.into_latents[0]->down.rows, values = model.value_dim;
        const Floats plain = plain_parts(q.get());
        const Floats carried = floats(model.heads * tokens * rank), reached = floats(model.heads * tokens * rank);
        carry(block.into_latents, plain.get(), carried.get());
        moe_serve_attend_to_latents(&model, &step, i, q.get(), carried.get(), reached.get(), num_threads);
        const Floats back = floats(model.heads * tokens * values);
        carry(block.from_latents, reached.get(), back.get());
        Floats out = floats(tokens * model.heads * values);
        for (int64_t h = 0; h < model.heads; ++h) {
            for (int64_t t = 0; t < tokens; ++t) {
                std::copy_n(back.get() + (h * tokens + t) * values, values, out.get() + (t * model.heads + h) * values);
            }
        }
        return out;
    }

    // [T, Hq, D].
    Floats queries(const Block& block) const {
        if (!block.q_latent) return linear(block.q, normed.get());
        const Floats latents = linear(block.q_latent, normed.get());
        const int64_t rank = block.q_latent->down.rows;
        const Floats narrow = floats(tokens * rank);
        norm(latents.get(), block.q_latent_norm, model.latent_norm_eps, rank, narrow.get());
        return linear(block.q, narrow.get());
    }

    // What of queries [T, Hq, D] is not rotated: [Hq, T, D - R].
    Floats plain_parts(const float* q) const {
        const int64_t width = model.head_dim - model.rotary_dim;
        Floats out = floats(model.heads * tokens * width);
        for (int64_t h = 0; h < model.heads; ++h) {
            for (int64_t t = 0; t < tokens; ++t) {
                std::copy_n(q + (t * model.heads + h) * model.head_dim, width, out.get() + (h * tokens + t) * width);
            }
        }
        return out;
    }

    void carry(const Expert* const* heads, const float* x, float* out) const {
        check(moe_serve_linears(x, heads, model.heads, out, tokens, num_threads));
    }

    void add_shared(const Block& block) const {
        std::vector<int64_t> every(static_cast<std::size_t>(tokens));
        std::iota(every.begin(), every.end(), 0);
        const Pairs pairs{block.shared, 0, tokens};
        check(moe_serve_expert_mlp(normed.get(), every.data(), added.get(), &pairs, 1, model.hidden,
                                   block.shared->gate.rows, static_cast<int32_t>(model.activation), alpha(), limit(),
                                   num_threads));
        if (!block.shared_gate) return add(model, step, added.get(), nullptr);
        const Floats gate = linear(block.shared_gate, normed.get());
        moe_serve_probabilities(tokens, gate.get(), num_threads);
        add(model, step, added.get(), gate.get());
    }

    void add_experts(const Block& block, int64_t i) const {
        const Floats scores = linear(block.router, normed.get());
        const int64_t choices = block.route * tokens * model.top_k;
        int64_t* ids = step.ids + choices;
        float* weights = step.weights + choices;
        moe_serve_route(&model, i, tokens, scores.get(), ids, weights, num_threads);
        check(moe_serve_expert_layer(normed.get(), ids, weights, added.get(), counts + block.route * model.num_experts,
                                     block.experts, model.num_experts, tokens, model.top_k,
                                     static_cast<int32_t>(model.activation), alpha(), limit(), num_threads));
        add(model, step, added.get(), nullptr);
    }

    float alpha() const { return static_cast<float>(model.activation_alpha); }
    float limit() const { return static_cast<float>(model.activation_limit); }
};

}  // namespace

// x, and of every block with a router ids and weights [L, T, K] and how many pairs each expert had, counts [L, E]. False:
// out of memory; then keys and values of some layers may have been written, and x means nothing.
extern "C" bool moe_serve_prompt_step(const Model* model, const Step* step, int64_t* counts, int32_t num_threads) {
    try {
        PromptStep(*model, *step, counts, num_threads).run();
    } catch (const std::bad_alloc&) {
        return false;
    }
    return true;
}
