// What Python has to know of this library, told by the compiler: structs with their fields, enums, constants and the
// signatures of functions. layout.py reads it, one line of text each:
//
//   struct NAME BYTES                     its fields follow in order
//   field NAME KIND OFFSET
//   value NAME NUMBER                     NAME is a constant or ENUM.VALUE
//   function NAME RESULT ARGUMENT...
//   isa NAME                              the instruction set that the kernels use on this processor
//
// KIND, RESULT and ARGUMENT are letters of Python's struct module (v: void), or a struct's name.

#include <cstddef>
#include <sstream>
#include <string>
#include <type_traits>

#include "contract/api.h"
#include "simd/amx.h"

using namespace moe_serve;

namespace {

template <typename T>
constexpr const char* kind_of() {
    if constexpr (std::is_pointer_v<T>) return "P";
    else if constexpr (std::is_same_v<T, int64_t>) return "q";
    else if constexpr (std::is_same_v<T, int32_t>) return "i";
    else if constexpr (std::is_same_v<T, float>) return "f";
    else if constexpr (std::is_same_v<T, double>) return "d";
    else if constexpr (std::is_same_v<T, bool>) return "?";
    else if constexpr (std::is_same_v<T, Matrix>) return "Matrix";
    else if constexpr (std::is_same_v<T, Bias>) return "Bias";
    else if constexpr (std::is_same_v<T, Sizes>) return "Sizes";
    else {
        static_assert(std::is_void_v<T>, "Python has no word for this type");
        return "v";
    }
}

struct Field {
    const char *name, *kind;
    std::size_t offset, bytes;
};

#define FIELD(Struct, name) {#name, kind_of<decltype(Struct::name)>(), offsetof(Struct, name), sizeof(Struct::name)}

constexpr Field MATRIX[] = {FIELD(Matrix, data),         FIELD(Matrix, stride),         FIELD(Matrix, rows),
                            FIELD(Matrix, columns),      FIELD(Matrix, scales),         FIELD(Matrix, scale_kind),
                            FIELD(Matrix, scale_stride), FIELD(Matrix, rows_per_scale), FIELD(Matrix, group),
                            FIELD(Matrix, zeros),        FIELD(Matrix, zero_stride),    FIELD(Matrix, zero),
                            FIELD(Matrix, block_type),   FIELD(Matrix, scale_table),    FIELD(Matrix, exponents),
                            FIELD(Matrix, rare),         FIELD(Matrix, rare_size)};
constexpr Field BIAS[] = {FIELD(Bias, data), FIELD(Bias, stride), FIELD(Bias, bf16)};
constexpr Field EXPERT[] = {FIELD(Expert, gate),      FIELD(Expert, up),      FIELD(Expert, down),
                            FIELD(Expert, gate_bias), FIELD(Expert, up_bias), FIELD(Expert, down_bias),
                            FIELD(Expert, kind)};
constexpr Field PAIRS[] = {FIELD(Pairs, expert), FIELD(Pairs, begin), FIELD(Pairs, end)};
constexpr Field BLOCK[] = {FIELD(Block, q),
                           FIELD(Block, k),
                           FIELD(Block, v),
                           FIELD(Block, o),
                           FIELD(Block, q_latent),
                           FIELD(Block, kv_latent),
                           FIELD(Block, into_latents),
                           FIELD(Block, from_latents),
                           FIELD(Block, q_latent_norm),
                           FIELD(Block, kv_latent_norm),
                           FIELD(Block, router),
                           FIELD(Block, correction),
                           FIELD(Block, shared),
                           FIELD(Block, shared_gate),
                           FIELD(Block, input_norm),
                           FIELD(Block, post_norm),
                           FIELD(Block, q_norm),
                           FIELD(Block, k_norm),
                           FIELD(Block, sinks),
                           FIELD(Block, window),
                           FIELD(Block, keys),
                           FIELD(Block, values),
                           FIELD(Block, kv_bf16),
                           FIELD(Block, experts),
                           FIELD(Block, route)};
constexpr Field SIZES[] = {
    FIELD(Sizes, intermediate), FIELD(Sizes, shared_intermediate), FIELD(Sizes, width),  FIELD(Sizes, kv),
    FIELD(Sizes, q_latent),     FIELD(Sizes, kv_latent),           FIELD(Sizes, scratch)};
constexpr Field MODEL[] = {FIELD(Model, blocks),
                           FIELD(Model, num_blocks),
                           FIELD(Model, final_norm),
                           FIELD(Model, head),
                           FIELD(Model, hidden),
                           FIELD(Model, heads),
                           FIELD(Model, kv_heads),
                           FIELD(Model, head_dim),
                           FIELD(Model, value_dim),
                           FIELD(Model, num_experts),
                           FIELD(Model, top_k),
                           FIELD(Model, kv_tokens),
                           FIELD(Model, page_size),
                           FIELD(Model, norms_all_heads),
                           FIELD(Model, rotary_dim),
                           FIELD(Model, rotary_kind),
                           FIELD(Model, score_kind),
                           FIELD(Model, renormalize),
                           FIELD(Model, num_groups),
                           FIELD(Model, top_groups),
                           FIELD(Model, best_of_group),
                           FIELD(Model, activation),
                           FIELD(Model, activation_alpha),
                           FIELD(Model, activation_limit),
                           FIELD(Model, norm_eps),
                           FIELD(Model, latent_norm_eps),
                           FIELD(Model, attention_scale),
                           FIELD(Model, routing_scale),
                           FIELD(Model, residual_scale),
                           FIELD(Model, sizes)};
constexpr Field STEP[] = {FIELD(Step, num_tokens), FIELD(Step, cos),           FIELD(Step, sin),
                          FIELD(Step, kv_slots),   FIELD(Step, starts),        FIELD(Step, page_table),
                          FIELD(Step, lengths),    FIELD(Step, num_sequences), FIELD(Step, table_width),
                          FIELD(Step, x),          FIELD(Step, normed),        FIELD(Step, ids),
                          FIELD(Step, weights),    FIELD(Step, logits)};

// Each field begins where the one before it ends, and the last one ends the struct: none is left out above.
template <typename Struct, std::size_t N>
constexpr bool covers(const Field (&fields)[N]) {
    std::size_t end = 0;
    for (const Field& field : fields) {
        if (field.offset != end) return false;
        end += field.bytes;
    }
    return end == sizeof(Struct);
}

template <typename Struct, std::size_t N>
void tell_struct(std::ostream& text, const char* name, const Field (&fields)[N]) {
    text << "struct " << name << ' ' << sizeof(Struct) << '\n';
    for (const Field& field : fields)
        text << "field " << field.name << ' ' << field.kind << ' ' << field.offset << '\n';
}

#define TELL_STRUCT(Struct, fields)                                                \
    static_assert(covers<Struct>(fields), "a field of " #Struct " is not listed"); \
    tell_struct<Struct>(text, #Struct, fields)

void tell_structs(std::ostream& text) {
    TELL_STRUCT(Matrix, MATRIX);
    TELL_STRUCT(Bias, BIAS);
    TELL_STRUCT(Expert, EXPERT);
    TELL_STRUCT(Pairs, PAIRS);
    TELL_STRUCT(Block, BLOCK);
    TELL_STRUCT(Sizes, SIZES);
    TELL_STRUCT(Model, MODEL);
    TELL_STRUCT(Step, STEP);
}

void tell_value(std::ostream& text, const char* name, int64_t value) {
    text << "value " << name << ' ' << value << '\n';
}

#define TELL_CONSTANT(name) tell_value(text, #name, name)
#define TELL_ENUM(Enum, name) tell_value(text, #Enum "." #name, static_cast<Enum>(name))

void tell_values(std::ostream& text) {
    TELL_CONSTANT(STREAM_MAX_TOKENS);
    TELL_CONSTANT(MOST_CHOICES);
    TELL_ENUM(ActivationKind, SILU);
    TELL_ENUM(ActivationKind, GELU);
    TELL_ENUM(ActivationKind, GELU_TANH);
    TELL_ENUM(ActivationKind, RELU);
    TELL_ENUM(ActivationKind, CLAMPED_SWIGLU);
    TELL_ENUM(WeightKind, FLOAT32);
    TELL_ENUM(WeightKind, BFLOAT16);
    TELL_ENUM(WeightKind, FLOAT16);
    TELL_ENUM(WeightKind, INT8);
    TELL_ENUM(WeightKind, UINT8);
    TELL_ENUM(WeightKind, FP8);
    TELL_ENUM(WeightKind, INT4);
    TELL_ENUM(WeightKind, FP4);
    TELL_ENUM(WeightKind, ROUNDED_BFLOAT16);
    TELL_ENUM(WeightKind, BLOCKS);
    TELL_ENUM(BlockType, BLOCK_Q4_0);
    TELL_ENUM(BlockType, BLOCK_Q4_1);
    TELL_ENUM(BlockType, BLOCK_Q5_0);
    TELL_ENUM(BlockType, BLOCK_Q5_1);
    TELL_ENUM(BlockType, BLOCK_Q8_0);
    TELL_ENUM(BlockType, BLOCK_Q2_K);
    TELL_ENUM(BlockType, BLOCK_Q3_K);
    TELL_ENUM(BlockType, BLOCK_Q4_K);
    TELL_ENUM(BlockType, BLOCK_Q5_K);
    TELL_ENUM(BlockType, BLOCK_Q6_K);
    TELL_ENUM(BlockType, BLOCK_IQ4_NL);
    TELL_ENUM(BlockType, BLOCK_IQ4_XS);
    TELL_ENUM(BlockType, BLOCK_MXFP4);
    TELL_ENUM(ScaleKind, SCALE_FLOAT32);
    TELL_ENUM(ScaleKind, SCALE_BFLOAT16);
    TELL_ENUM(ScaleKind, SCALE_FLOAT16);
    TELL_ENUM(ScaleKind, SCALE_UINT8);
    TELL_ENUM(ScaleKind, SCALE_TABLE);
    TELL_ENUM(ScoreKind, SOFTMAX);
    TELL_ENUM(ScoreKind, SIGMOID);
    TELL_ENUM(ScoreKind, SOFTMAX_OF_CHOSEN);
    TELL_ENUM(RotaryKind, HALVES);
    TELL_ENUM(RotaryKind, NEIGHBOURS);
    TELL_ENUM(RotaryKind, NEIGHBOURS_TO_HALVES);
}

template <typename Result, typename... Arguments>
void tell_function(std::ostream& text, const char* name, Result (*)(Arguments...)) {
    text << "function " << name << ' ' << kind_of<Result>();
    ((text << ' ' << kind_of<Arguments>()), ...);
    text << '\n';
}

#define TELL_FUNCTION(name) tell_function(text, #name, name)

void tell_functions(std::ostream& text) {
    TELL_FUNCTION(moe_serve_expert_mlp);
    TELL_FUNCTION(moe_serve_expert_mlp_start);
    TELL_FUNCTION(moe_serve_expert_mlp_finish);
    TELL_FUNCTION(moe_serve_expert_layer);
    TELL_FUNCTION(moe_serve_combine);
    TELL_FUNCTION(moe_serve_linear);
    TELL_FUNCTION(moe_serve_linears);
    TELL_FUNCTION(moe_serve_unpack_rows);
    TELL_FUNCTION(moe_serve_paged_attention);
    TELL_FUNCTION(moe_serve_decode_memory);
    TELL_FUNCTION(moe_serve_decode_step);
    TELL_FUNCTION(moe_serve_decode_until_experts);
    TELL_FUNCTION(moe_serve_decode_shared);
    TELL_FUNCTION(moe_serve_decode_head);
    TELL_FUNCTION(moe_serve_prompt_step);
    TELL_FUNCTION(moe_serve_norm);
    TELL_FUNCTION(moe_serve_attend);
    TELL_FUNCTION(moe_serve_write_latents);
    TELL_FUNCTION(moe_serve_attend_to_latents);
    TELL_FUNCTION(moe_serve_route);
    TELL_FUNCTION(moe_serve_probabilities);
}

const char* isa() {
#ifdef X86_VERSIONS
    if (has_amx()) return "amx";
    return has_avx512() ? "avx512" : has_avx2() ? "avx2" : "generic";
#else
    return "generic";
#endif
}

}  // namespace

extern "C" const char* moe_serve_layout() {
    static const std::string layout = [] {
        std::ostringstream text;
        tell_structs(text);
        tell_values(text);
        tell_functions(text);
        text << "isa " << isa() << '\n';
        return text.str();
    }();
    return layout.c_str();
}
