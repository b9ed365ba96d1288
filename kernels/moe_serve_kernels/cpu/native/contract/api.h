// Every function that Python calls. contract/layout.cpp tells Python these signatures; what the functions do stands
// where they are defined.

#pragma once

#include <cstdint>

#include "decode/decode_step.h"
#include "experts/segments.h"

extern "C" {

const char* moe_serve_layout();

bool moe_serve_expert_mlp(const float* x, const int64_t* tokens, float* out, const moe_serve::Pairs* pairs,
                          int64_t num_segments, int64_t hidden, int64_t inner, int32_t activation, float alpha,
                          float limit, int32_t num_threads);
void* moe_serve_expert_mlp_start(const float* x, const int64_t* tokens, const moe_serve::Pairs* pairs, int64_t hidden,
                                 int64_t inner, int32_t activation, float alpha, float limit, int32_t num_threads);
void moe_serve_expert_mlp_finish(void* started, float* out, int32_t num_threads);
bool moe_serve_expert_layer(const float* x, const int64_t* ids, const float* weights, float* out, int64_t* counts,
                            const moe_serve::Expert* const* experts, int64_t num_experts, int64_t num_tokens,
                            int64_t top_k, int32_t activation, float alpha, float limit, int32_t num_threads);
void moe_serve_combine(const float* pairs, const int64_t* place_of, const float* weights, float* out,
                       int64_t num_tokens, int64_t top_k, int64_t hidden, int32_t num_threads);
bool moe_serve_linear(const float* x, const moe_serve::Expert* layer, float* out, int64_t count, int32_t num_threads);
bool moe_serve_linears(const float* x, const moe_serve::Expert* const* layers, int64_t num_layers, float* out,
                       int64_t count, int32_t num_threads);
void moe_serve_unpack_rows(const moe_serve::Expert* table, const int64_t* rows, int64_t count, float* out);

void moe_serve_paged_attention(const float* query, const void* keys, const void* values, const int64_t* page_table,
                               const int64_t* starts, const int64_t* lengths, const int64_t* firsts, const float* sinks,
                               float* out, int64_t num_seqs, int64_t kv_heads, int64_t groups, int64_t key_dim,
                               int64_t value_dim, int64_t value_stride, int64_t tokens, int64_t page_size,
                               int64_t table_width, float scale, int64_t window, int64_t bf16, int32_t num_threads);

int64_t moe_serve_decode_memory(moe_serve::Model* model, int64_t num_tokens, int32_t num_threads);
void moe_serve_decode_step(const moe_serve::Model* model, const moe_serve::Step* step, float* memory,
                           int32_t num_threads);
void moe_serve_decode_until_experts(const moe_serve::Model* model, const moe_serve::Step* step, int64_t block,
                                    float* memory, int32_t num_threads);
void moe_serve_decode_shared(const moe_serve::Model* model, const moe_serve::Step* step, int64_t block, float* memory,
                             int32_t num_threads);
void moe_serve_decode_head(const moe_serve::Model* model, const moe_serve::Step* step, float* memory,
                           int32_t num_threads);

bool moe_serve_prompt_step(const moe_serve::Model* model, const moe_serve::Step* step, int64_t* counts,
                           int32_t num_threads);

void moe_serve_norm(const float* x, const float* weight, double eps, int64_t rows, int64_t columns, float* out,
                    int32_t num_threads);
void moe_serve_attend(const moe_serve::Model* model, const moe_serve::Step* step, int64_t block, const float* q,
                      const float* k, const float* v, float* attended, int32_t num_threads);
void moe_serve_write_latents(const moe_serve::Model* model, const moe_serve::Step* step, int64_t block, const float* kv,
                             int32_t num_threads);
void moe_serve_attend_to_latents(const moe_serve::Model* model, const moe_serve::Step* step, int64_t block,
                                 const float* q, const float* carried, float* out, int32_t num_threads);
void moe_serve_route(const moe_serve::Model* model, int64_t block, int64_t num_tokens, const float* scores,
                     int64_t* ids, float* weights, int32_t num_threads);
void moe_serve_probabilities(int64_t count, float* scores, int32_t num_threads);
}
