// Experts and linear layers cut into rows and segments of tokens: what expert_mlp.cpp and decode_step.cpp share.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "simd/vectors.h"

namespace moe_serve {

typedef uint16_t Bf16;
struct Half {
    uint16_t bits;
};

enum ActivationKind { SILU, GELU, GELU_TANH, RELU, CLAMPED_SWIGLU };

struct Activation {
    int32_t kind;
    float alpha, limit;
};

// ROUNDED_BFLOAT16: bf16 weights that meet tokens rounded to bf16.
enum WeightKind { FLOAT32, BFLOAT16, FLOAT16, INT8, UINT8, FP8, INT4, FP4, BLOCKS, ROUNDED_BFLOAT16 };
// UINT8: e8m0, 2^(byte - 127). TABLE: bytes that name a matrix's entries of a table.
enum ScaleKind { SCALE_FLOAT32, SCALE_BFLOAT16, SCALE_FLOAT16, SCALE_UINT8, SCALE_TABLE };

// ggml's types of blocks, whose codes and scales lie side by side (experts/blocks.inc).
enum BlockType {
    BLOCK_Q4_0,
    BLOCK_Q4_1,
    BLOCK_Q5_0,
    BLOCK_Q5_1,
    BLOCK_Q8_0,
    BLOCK_Q2_K,
    BLOCK_Q3_K,
    BLOCK_Q4_K,
    BLOCK_Q5_K,
    BLOCK_Q6_K,
    BLOCK_IQ4_NL,
    BLOCK_IQ4_XS,
    BLOCK_MXFP4
};

// Where one expert's weights lie: expert_mlp.py fills these in by name (contract/layout.cpp), all 64-bit.
//
// Quantised: the weight in row r, column k is (code - zero) * scale, with the scale at
// [r / rows_per_scale][k / group], the zero point the sum of `zero` and, unless null, zeros[r][k / group].
// UINT8 codes are read as if 128 less. Of BLOCKS there is `block_type`, which may differ between an expert's matrices.
struct Matrix {
    const char* data;
    int64_t stride, rows, columns;  // stride in bytes
    const void* scales;
    int64_t scale_kind, scale_stride, rows_per_scale, group;  // strides in elements from here on
    const uint8_t* zeros;
    int64_t zero_stride, zero, block_type;
    const float* scale_table;  // [256], with SCALE_TABLE
    const uint8_t* exponents;  // [16], of bf16 weights in coded rows (experts/coded.inc); null: in plain rows
    const int32_t* rare;       // rare_size of them: where the rare weights of each row begin, and those weights
    int64_t rare_size;

    const char* row(int64_t r) const { return data + (r < rows ? r : rows - 1) * stride; }
};

struct Bias {
    const void* data;  // null: none
    int64_t stride, bf16;

    float at(int64_t i) const {
        if (!bf16) return static_cast<const float*>(data)[i * stride];
        union {
            uint32_t i;
            float f;
        } bits;
        bits.i = static_cast<uint32_t>(static_cast<const Bf16*>(data)[i * stride]) << 16;
        return bits.f;
    }
};

struct Expert {
    Matrix gate, up, down;
    Bias gate_bias, up_bias, down_bias;
    int64_t kind;
};

// One scale and no zero point for each row.
inline bool has_row_scales(const Expert& expert) {
    for (const Matrix* matrix : {&expert.gate, &expert.up, &expert.down}) {
        if (matrix->group < matrix->columns || matrix->zeros || matrix->zero) return false;
    }
    return true;
}

// Some of the matrices are coded.
inline bool is_coded(const Expert& expert) {
    return expert.gate.exponents || expert.up.exponents || expert.down.exponents;
}

// A group that is no whole number of 64-byte grains of four-bit codes.
inline bool has_lane_scales(const Expert& expert) {
    for (const Matrix* matrix : {&expert.gate, &expert.up, &expert.down}) {
        if (matrix->group % 128 && matrix->group < matrix->columns) return true;
    }
    return false;
}

struct Pairs {
    const Expert* expert;
    int64_t begin, end;
};

// Activations in scratch memory: a row of `stride` floats per token, in the order that the weights' format wants,
// zeros behind the last.
struct Tokens {
    float* data;
    int64_t count, stride;
};

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Zeros for what follows a token's last column; gate and up fill the rest.
inline void clear_ends(const Tokens& tokens, int64_t grain) {
    for (int64_t t = 1; t <= tokens.count; ++t) std::fill_n(tokens.data + t * tokens.stride - grain, grain, 0.0f);
}

struct Segment;

// One instruction set's arithmetic for one weight format.
struct Steps {
    int64_t grain;  // of `Tokens`: floats at the end of a row that may be no columns
    int64_t (*stride)(int64_t columns, int64_t count);  // floats of a row of `count` tokens
    int64_t (*scratch)(const Segment&);                 // floats that one thread needs to compute BLOCK_ROWS rows
    void (*gather)(const float* x, const int64_t* tokens, int64_t columns, const Tokens& target);
    void (*gate_up)(const Segment&, const Activation&, int64_t row, float* scratch);
    void (*down)(const Segment&, int64_t row, float* out, float* scratch);
};

struct Segment {
    const Expert* expert;
    int64_t begin;
    Steps steps;
    Tokens x, inner;
};

constexpr int64_t STREAM_MAX_TOKENS = 6;  // with more, weights are packed first (block.inc)
constexpr int64_t BLOCK_ROWS = 64;        // of a weight, per task
constexpr int64_t LINEAR_TOKENS = 256;    // of one segment of a linear layer: enough to pay for packing its weights

// out[i] = sum over k of weights[k] * rows[k][i] for columns `first` .. `last`-1: the same bits in every caller.
void weighted_sum(const float* const* rows, const float* weights, int64_t top_k, int64_t first, int64_t last,
                  float* out);

// How a segment is multiplied on this processor; its tokens have no memory yet.
Segment plan(const Pairs& pairs);

struct Free {
    void operator()(float* memory) const { std::free(memory); }
};

inline std::unique_ptr<float, Free> allocate(int64_t elements) {
    return std::unique_ptr<float, Free>(
        static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(round_up(elements, 16)) * sizeof(float))));
}

}  // namespace moe_serve
