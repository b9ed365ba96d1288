// The experts of one MoE layer, float32 activations on weights read where they lie: float32, bf16, float16, quantised
// to eight or four bits (experts/weights.inc), or ggml's blocks (experts/blocks.inc). Activations are never rounded.
//
//   for each segment (an expert and its tokens), rows of all experts split over threads:
//     inner[t] = activation(gate @ x[t] + gate_bias, up @ x[t] + up_bias)
//   barrier
//   for each segment, likewise:
//     out[t] = down @ inner[t] + down_bias
//
// With few tokens the time is the time to read the weights: each row is read once and made floats in registers
// (experts/stream.inc). With many it is the arithmetic (experts/block.inc). An element of `out` is summed by one thread,
// in an order that depends on its weights' format only: not on the other tokens, and not on how many there are. Plain C
// ABI, no libtorch.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <memory>
#include <numeric>
#include <type_traits>
#include <vector>

#include <omp.h>

#include "contract/api.h"
#include "experts/segments.h"
#include "simd/amx.h"

using namespace moe_serve;

#define ARITHMETIC "experts/expert_mlp.inc"
#include "simd/per_isa.inc"

Segment moe_serve::plan(const Pairs& pairs) {
    const int64_t count = pairs.end - pairs.begin;
    const Expert& expert = *pairs.expert;
    const Steps steps = FOR_THIS_CPU(steps)(expert);
    const auto tokens = [&](int64_t columns) { return Tokens{nullptr, count, steps.stride(columns, count)}; };
    return {pairs.expert, pairs.begin, steps, tokens(expert.gate.columns), tokens(expert.down.columns)};
}

void moe_serve::weighted_sum(const float* const* rows, const float* weights, int64_t top_k, int64_t first, int64_t last,
                             float* out) {
    FOR_THIS_CPU(weighted_sum)(rows, weights, top_k, first, last, out);
}

namespace {

int64_t size_of(const Tokens& tokens) { return tokens.count * tokens.stride; }

struct Layer {
    const float* x;
    const int64_t* tokens;
    int64_t hidden, inner;
    Activation activation;
    std::vector<Segment> segments;
    std::unique_ptr<float, Free> memory;
    int64_t scratch_stride = 0;  // of one thread; all threads' scratch comes first in `memory`

    int64_t num_pairs() const {
        int64_t total = 0;
        for (const Segment& segment : segments) total += segment.x.count;
        return total;
    }
    int64_t num_gathered() const { return num_pairs() * hidden; }
    int64_t num_products() const { return num_pairs() * 3 * hidden * inner; }
};

bool place(Layer& layer, int32_t num_threads) {
    int64_t total = 0;
    for (const Segment& segment : layer.segments) {
        layer.scratch_stride = std::max(layer.scratch_stride, round_up(segment.steps.scratch(segment), 16));
        total += round_up(size_of(segment.x), 16) + round_up(size_of(segment.inner), 16);
    }
    layer.memory = allocate(total + num_threads * layer.scratch_stride);
    float* next = layer.memory.get();
    if (!next) return false;
    next += num_threads * layer.scratch_stride;
    for (Segment& segment : layer.segments) {
        for (Tokens* tokens : {&segment.x, &segment.inner}) {
            tokens->data = next;
            next += round_up(size_of(*tokens), 16);
        }
    }
    return true;
}

// Elements that one thread gathers, and products that it adds, sooner than a second one wakes up.
constexpr int64_t GATHER_ALONE = 1 << 17;
constexpr int64_t MULTIPLY_ALONE = 1 << 19;

// Calls task(segment, row, scratch) for every block of `rows` rows of every segment.
template <typename Task>
void for_each_block(const Layer& layer, int64_t rows, Task task) {
    float* scratch = layer.memory.get() + omp_get_thread_num() * layer.scratch_stride;
    const int64_t blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const int64_t tasks = blocks * static_cast<int64_t>(layer.segments.size());
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tasks; ++i) task(layer.segments[i / blocks], i % blocks * BLOCK_ROWS, scratch);
}

void gather(const Layer& layer, int32_t num_threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads) if (layer.num_gathered() > GATHER_ALONE)
    for (std::size_t i = 0; i < layer.segments.size(); ++i) {
        const Segment& segment = layer.segments[i];
        segment.steps.gather(layer.x, layer.tokens + segment.begin, layer.hidden, segment.x);
        clear_ends(segment.inner, segment.steps.grain);
    }
}

// The two halves, in whole or in part: `first` computes inner from x, `second` out from inner.
void multiply(const Layer& layer, bool first, bool second, float* out, int32_t num_threads) {
#pragma omp parallel num_threads(num_threads) if (layer.num_products() > MULTIPLY_ALONE)
    {
        if (first) {
            for_each_block(layer, layer.inner, [&](const Segment& segment, int64_t row, float* scratch) {
                segment.steps.gate_up(segment, layer.activation, row, scratch);
            });
        }
        if (second) {
            for_each_block(layer, layer.hidden, [&](const Segment& segment, int64_t row, float* scratch) {
                segment.steps.down(segment, row, out + segment.begin * layer.hidden, scratch);
            });
        }
    }
}

}  // namespace

// x [T, hidden]; tokens [P]; out [P, hidden], written only inside the segments. False: out of memory.
extern "C" bool moe_serve_expert_mlp(const float* x, const int64_t* tokens, float* out, const Pairs* pairs,
                                     int64_t num_segments, int64_t hidden, int64_t inner, int32_t activation,
                                     float alpha, float limit, int32_t num_threads) {
    Layer layer{x, tokens, hidden, inner, {activation, alpha, limit}, {}, {}};
    for (int64_t i = 0; i < num_segments; ++i) {
        if (pairs[i].begin < pairs[i].end) layer.segments.push_back(plan(pairs[i]));
    }
    if (!place(layer, num_threads)) return false;
    gather(layer, num_threads);
    multiply(layer, true, true, out, num_threads);
    return true;
}

namespace {

// Pairs p = t * K + k sorted by expert, in ascending order within one.
struct Groups {
    std::vector<int64_t> tokens, place_of;  // [P] token of each place, place of each pair
    std::vector<int64_t> ends;              // [E] behind each expert's last place

    Groups(const int64_t* ids, int64_t num_pairs, int64_t top_k, int64_t num_experts)
        : tokens(num_pairs), place_of(num_pairs), ends(num_experts) {
        std::vector<int64_t> next(num_experts);
        for (int64_t p = 0; p < num_pairs; ++p) ++ends[ids[p]];
        for (int64_t e = 1; e < num_experts; ++e) ends[e] += next[e] = ends[e - 1];
        for (int64_t p = 0; p < num_pairs; ++p) {
            place_of[p] = next[ids[p]]++;
            tokens[place_of[p]] = p / top_k;
        }
    }
};

}  // namespace

// out[t] = sum over k of weights[t][k] * pairs[t * K + k], in the router's order; `place_of`: where in `pairs` each
// pair is, null: in its own place.
extern "C" void moe_serve_combine(const float* pairs, const int64_t* place_of, const float* weights, float* out,
                                  int64_t num_tokens, int64_t top_k, int64_t hidden, int32_t num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_tokens * top_k * hidden > GATHER_ALONE)
    for (int64_t t = 0; t < num_tokens; ++t) {
        std::vector<const float*> rows(static_cast<std::size_t>(top_k));
        for (int64_t k = 0; k < top_k; ++k) {
            const int64_t pair = t * top_k + k;
            rows[k] = pairs + (place_of ? place_of[pair] : pair) * hidden;
        }
        weighted_sum(rows.data(), weights + t * top_k, top_k, 0, hidden, out + t * hidden);
    }
}

// A whole layer whose experts are all in place: x [T, hidden], ids and weights [T, K] -> out [T, hidden], and how many
// pairs each expert had, counts [E]. False: out of memory.
extern "C" bool moe_serve_expert_layer(const float* x, const int64_t* ids, const float* weights, float* out,
                                       int64_t* counts, const Expert* const* experts, int64_t num_experts,
                                       int64_t num_tokens, int64_t top_k, int32_t activation, float alpha, float limit,
                                       int32_t num_threads) {
    const Groups groups(ids, num_tokens * top_k, top_k, num_experts);
    const int64_t hidden = experts[0]->gate.columns, inner = experts[0]->gate.rows;
    Layer layer{x, groups.tokens.data(), hidden, inner, {activation, alpha, limit}, {}, {}};
    for (int64_t e = 0, begin = 0; e < num_experts; begin = groups.ends[e++]) {
        counts[e] = groups.ends[e] - begin;
        if (counts[e]) layer.segments.push_back(plan({experts[e], begin, groups.ends[e]}));
    }
    const auto pairs = allocate(num_tokens * top_k * hidden);
    if (!pairs || !place(layer, num_threads)) return false;
    gather(layer, num_threads);
    multiply(layer, true, true, pairs.get(), num_threads);
    moe_serve_combine(pairs.get(), groups.place_of.data(), weights, out, num_tokens, top_k, hidden, num_threads);
    return true;
}

// Linear layers of one size, each on rows of its own: out [N, count, rows] = x [N, count, columns] @ down^T + down_bias,
// of experts [N] that have nothing else. A row of `out` depends on its row of `x` alone. False: out of memory.
extern "C" bool moe_serve_linears(const float* x, const Expert* const* layers, int64_t num_layers, float* out,
                                  int64_t count, int32_t num_threads) {
    Layer layer{x, nullptr, layers[0]->down.rows, layers[0]->down.columns, {}, {}, {}};
    for (int64_t i = 0; i < num_layers; ++i) {
        for (int64_t begin = 0; begin < count; begin += LINEAR_TOKENS) {
            const int64_t end = std::min(count, begin + LINEAR_TOKENS);
            layer.segments.push_back(plan({layers[i], i * count + begin, i * count + end}));
        }
    }
    if (!place(layer, num_threads)) return false;
    std::vector<int64_t> order(static_cast<std::size_t>(std::min(count, LINEAR_TOKENS)));
    std::iota(order.begin(), order.end(), 0);
    const int64_t columns = layer.inner;
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads) if (num_layers * count * columns > GATHER_ALONE)
    for (std::size_t i = 0; i < layer.segments.size(); ++i) {
        const Segment& segment = layer.segments[i];
        segment.steps.gather(x + segment.begin * columns, order.data(), columns, segment.inner);
    }
    multiply(layer, false, true, out, num_threads);
    return true;
}

extern "C" bool moe_serve_linear(const float* x, const Expert* layer, float* out, int64_t count, int32_t num_threads) {
    return moe_serve_linears(x, &layer, 1, out, count, num_threads);
}

// The first half of one segment; `down` need not be readable yet. Null: out of memory. What it returns
// goes to moe_serve_expert_mlp_finish exactly once.
extern "C" void* moe_serve_expert_mlp_start(const float* x, const int64_t* tokens, const Pairs* pairs, int64_t hidden,
                                            int64_t inner, int32_t activation, float alpha, float limit,
                                            int32_t num_threads) {
    auto layer = std::make_unique<Layer>(Layer{x, tokens, hidden, inner, {activation, alpha, limit}, {}, {}});
    layer->segments.push_back(plan(*pairs));
    if (!place(*layer, num_threads)) return nullptr;
    gather(*layer, num_threads);
    multiply(*layer, true, false, nullptr, num_threads);
    return layer.release();
}

// The second half into out [P, hidden], with at most as many threads as the first. Null `out`: only give the memory back.
extern "C" void moe_serve_expert_mlp_finish(void* started, float* out, int32_t num_threads) {
    const std::unique_ptr<Layer> layer(static_cast<Layer*>(started));
    if (out) multiply(*layer, false, true, out, num_threads);
}
