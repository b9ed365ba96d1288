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
#include <vector>

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
    const void *keys, *values;
    const int64_t *pages, *starts, *lengths, *firsts;
    const float* sinks;
    float* out;
    int64_t num_seqs, kv_heads, groups, tokens, table_width, bf16;
};

// Tokens of one sequence that follow each other, and some of the heads that share a KV head.
struct Task {
    int64_t sequence, token, count, kv_head, head, heads;
};

// Of one KV head: heads are divided first where tokens come singly, so that threads have work.
void add_tasks(const Batch& batch, int64_t s, int64_t h, std::vector<Task>& tasks) {
    const int64_t begin = batch.starts ? batch.starts[s] : s, end = batch.starts ? batch.starts[s + 1] : s + 1;
    const int64_t heads = std::min(batch.groups, end - begin > 1 ? MOST_ROWS : HEADS_AT_ONCE);
    const int64_t most = end - begin > 1 ? MOST_ROWS / heads : 1;
    for (int64_t token = begin; token < end; token += most) {
        for (int64_t g = 0; g < batch.groups; g += heads) {
            tasks.push_back(
                {s, token, std::min(most, end - token), h, h * batch.groups + g, std::min(heads, batch.groups - g)});
        }
    }
}

// The ones that see most come first.
std::vector<Task> tasks_of(const Batch& batch) {
    std::vector<Task> tasks;
    for (int64_t s = 0; s < batch.num_seqs; ++s) {
        for (int64_t h = 0; h < batch.kv_heads; ++h) add_tasks(batch, s, h, tasks);
    }
    std::reverse(tasks.begin(), tasks.end());
    return tasks;
}

const void* at(const Batch& batch, const void* base, int64_t element) {
    return static_cast<const char*>(base) + element * (batch.bf16 ? sizeof(uint16_t) : sizeof(float));
}

// `memory` also has the queries.
void attend_to(const Batch& batch, const Task& task, Shape shape, float* memory) {
    const int64_t all = batch.kv_heads * batch.groups, stride = ::round_up(shape.key_dim);
    float* rows = memory + attend_memory(shape);
    std::fill_n(rows, task.count * task.heads * stride, 0.0f);
    for (int64_t i = 0; i < task.count * task.heads; ++i) {
        const int64_t head = (task.token + i / task.heads) * all + task.head + i % task.heads;
        std::copy_n(batch.query + head * shape.key_dim, shape.key_dim, rows + i * stride);
    }
    const int64_t s = task.sequence, before = task.token - (batch.starts ? batch.starts[s] : s);
    const Queries queries{rows,
                          stride,
                          task.count,
                          batch.lengths[s] + before,
                          batch.sinks ? batch.sinks + task.head : nullptr,
                          batch.out + (task.token * all + task.head) * shape.value_dim,
                          all * shape.value_dim,
                          shape.value_dim,
                          batch.firsts ? batch.firsts[s] : 0};
    const int64_t slot = task.kv_head * batch.tokens;
    const Context context{at(batch, batch.keys, slot * shape.key_dim),
                          at(batch, batch.values, slot * shape.value_stride), batch.pages + s * batch.table_width};
    shape.groups = task.heads;
    choose_attend(batch.bf16)(queries, context, shape, memory);
}

}  // namespace

// query [T, Hk*G, D]; keys [Hk, tokens, D]; values [Hk, tokens, Dv], `value_stride` from token to token, both bf16 if
// `bf16`; page_table [S, table_width]; starts [S + 1]: where each sequence's tokens begin, and T, or null: one each;
// lengths [S]: what the first of these sees, itself included; firsts [S] or null: the context before it is hidden;
// sinks [Hk*G] or null; out [T, Hk*G, Dv]. window <= 0: none.
extern "C" void moe_serve_paged_attention(const float* query, const void* keys, const void* values,
                                          const int64_t* page_table, const int64_t* starts, const int64_t* lengths,
                                          const int64_t* firsts, const float* sinks, float* out, int64_t num_seqs,
                                          int64_t kv_heads, int64_t groups, int64_t key_dim, int64_t value_dim,
                                          int64_t value_stride, int64_t tokens, int64_t page_size, int64_t table_width,
                                          float scale, int64_t window, int64_t bf16, int32_t num_threads) {
    const Batch batch{query, keys,     values,   page_table, starts, lengths,     firsts, sinks,
                      out,   num_seqs, kv_heads, groups,     tokens, table_width, bf16};
    const Shape shape{groups, key_dim, value_dim, value_stride, page_size, window, scale};
    const std::vector<Task> tasks = tasks_of(batch);
#pragma omp parallel num_threads(num_threads)
    {
        const auto memory = allocate(attend_memory(shape) + MOST_ROWS * ::round_up(key_dim));
#pragma omp for schedule(dynamic, 1)
        for (std::size_t task = 0; task < tasks.size(); ++task) attend_to(batch, tasks[task], shape, memory.get());
    }
}
