"""The tiny models of these tests: one config per family and per trait that changes the arithmetic.

Small enough to build and run in milliseconds, large enough that every mechanism is really used:
grouped query heads, more experts than are chosen, contexts longer than the sliding window. The
experts of each model take between 1 and 2 MiB, so that `moe_cache_mib=1` holds some of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig

VOCAB = 257
"""256 bytes and one end-of-text token (see tiny_checkpoints.tiny_tokenizer)."""
WINDOW = 24
"""Tokens; well below the longest contexts of the tests."""
POSITIONS = 256

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": False,
    # Greedy runs of a fixed length on both sides; end-of-sequence handling is tested in tests/engine.
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

LATENT_ATTENTION: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
"""DeepSeek: keys are 24 wide and values 12, unlike every other family."""

INDEXER: dict[str, Any] = {"index_topk": 16, "index_head_dim": 16, "index_n_heads": 8}

DEEPSEEK_EXPERTS: dict[str, Any] = {
    "intermediate_size": 96,
    "moe_intermediate_size": 64,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "n_group": 4,
    "topk_group": 2,
}
"""The first layer is dense; the experts of 2 of 4 groups are open to each token."""

FINE: dict[str, Any] = {
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "intermediate_size": 96,
}
"""Experts narrower than a dense MLP."""

GROUPED: dict[str, Any] = {
    "head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "intermediate_size": 96,
    "n_group": 2,
    "topk_group": 1,
}
"""The same under DeepSeek's names; the experts of 1 of 2 groups are open to each token."""

SLIDING: dict[str, Any] = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}

DELTA_NET: dict[str, Any] = {
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
"""Qwen3-Next: layers that keep a matrix per value head, and the last inputs of a convolution."""

KIMI: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "head_dim": 16,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "moe_intermediate_size": 64,
    "intermediate_size": 96,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
"""Kimi delta attention beside latent attention."""


def rope_of_images(*sections: int) -> dict[str, Any]:
    """Three positions per token, which differ in images only; `sections`: the frequencies that turn by each."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}}


TOWER: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}


SPEECH: dict[str, Any] = {
    "audio_config": {
        "d_model": 16,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "num_mel_bins": 16,
        "output_dim": 64,
        "downsample_hidden_size": 8,
    },
    "vision_start_token_id": VOCAB - 1,
}
"""Of Qwen3-Omni's thinker."""


@dataclass(frozen=True)
class TinyCase:
    """One tiny model: a config and the seed of its weights."""

    model_type: str
    fields: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    """Chosen so that no greedy choice of the tests is a near tie (test_references.py)."""
    std: float = 0.2
    """Of the random matrices."""
    tower: dict[str, Any] | None = None
    """vision_config of a composite; `fields` are its text_config's then."""
    outside: dict[str, Any] = field(default_factory=dict)
    """Other fields of a composite."""

    def config(self) -> Any:
        """The transformers config."""
        fields = {**COMMON, **self.fields}
        if self.tower is None:
            return AutoConfig.for_model(self.model_type, **fields)
        outer = {"text_config": fields, "vision_config": self.tower, "tie_word_embeddings": False, **self.outside}
        return AutoConfig.for_model(self.model_type, **outer)


SPANNING = ("mixtral", "qwen2_moe_window", "olmoe_clipped", "deepseek_v3", "glm4_moe", "gpt_oss", "phimoe")
"""Together these have every trait of the others: windows, latents, groups, shared and biased experts, odd layers."""
CASES: dict[str, TinyCase] = {
    "mixtral": TinyCase("mixtral", {"intermediate_size": 64, "num_local_experts": 8}),
    "mixtral_window": TinyCase("mixtral", {"intermediate_size": 64, "num_local_experts": 8, "sliding_window": WINDOW}),
    # Experts above 128 Ki elements per in-projection run in oneDNN's packed form, not as columns.
    "mixtral_wide": TinyCase(
        "mixtral", {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 544, "num_local_experts": 4}
    ),
    "qwen2_moe": TinyCase(
        "qwen2_moe",
        {
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 48,
            "intermediate_size": 96,
            "num_experts": 8,
            "num_experts_per_tok": 3,
        },
        seed=1,
    ),
    # Layers 0 and 2 slide, layer 1 does not; layer 1 has a dense MLP.
    "qwen2_moe_window": TinyCase(
        "qwen2_moe",
        {
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 48,
            "intermediate_size": 96,
            "num_experts": 12,
            "num_experts_per_tok": 2,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
        },
    ),
    "qwen3_moe": TinyCase(
        "qwen3_moe",
        {
            "moe_intermediate_size": 64,
            "intermediate_size": 96,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "head_dim": 24,
        },
    ),
    "olmoe": TinyCase("olmoe", {"intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 3}),
    "olmoe_clipped": TinyCase(
        "olmoe",
        {"intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 3, "clip_qkv": 2.0},
    ),
    "deepseek_v2": TinyCase(
        "deepseek_v2", {**LATENT_ATTENTION, **DEEPSEEK_EXPERTS, "topk_method": "group_limited_greedy"}
    ),
    # As V2-Lite: no low-rank queries, all experts open to every token.
    "deepseek_v2_lite": TinyCase("deepseek_v2", {**LATENT_ATTENTION, **DEEPSEEK_EXPERTS, "q_lora_rank": None}),
    "deepseek_v3": TinyCase(
        "deepseek_v3",
        {
            **LATENT_ATTENTION,
            **DEEPSEEK_EXPERTS,
            # Yarn multiplies the attention's scale, which only the attention function sees.
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 64,
            },
        },
        seed=1,
    ),
    # Layers 0 and 2 slide, layer 1 does not; every head has a sink.
    "gpt_oss": TinyCase(
        "gpt_oss",
        {
            "intermediate_size": 64,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "sliding_window": WINDOW,
        },
    ),
    "phimoe": TinyCase(
        "phimoe", {"intermediate_size": 64, "num_local_experts": 8, "attention_bias": True, "lm_head_bias": True}
    ),
    "phimoe_window": TinyCase("phimoe", {"intermediate_size": 64, "num_local_experts": 8, "sliding_window": WINDOW}),
    "granitemoe": TinyCase(
        "granitemoe",
        {
            "intermediate_size": 64,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.125,
            "residual_multiplier": 0.5,
            "logits_scaling": 0.5,
        },
    ),
    "glm4_moe": TinyCase(
        "glm4_moe",
        {
            "intermediate_size": 96,
            "moe_intermediate_size": 64,
            "n_routed_experts": 12,
            "num_experts_per_tok": 3,
            "n_group": 2,
            "topk_group": 1,
            "use_qk_norm": True,
            "attention_bias": True,
            "head_dim": 16,
        },
    ),
    "ernie4_5_moe": TinyCase(
        "ernie4_5_moe",
        {
            "intermediate_size": 96,
            "moe_intermediate_size": 64,
            "moe_num_experts": 12,
            "moe_num_shared_experts": 1,
            "moe_k": 3,
            "moe_layer_start_index": 1,
            "use_bias": True,
        },
        seed=1,
    ),
    "glm4_moe_lite": TinyCase(
        "glm4_moe_lite",
        {
            **LATENT_ATTENTION,
            "head_dim": 8,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "intermediate_size": 96,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
        },
    ),
    "minimax_m2": TinyCase(
        "minimax_m2", {"head_dim": 16, "intermediate_size": 64, "num_local_experts": 8, "num_experts_per_tok": 2}
    ),
    "dots1": TinyCase("dots1", {**GROUPED, "n_shared_experts": 1, "first_k_dense_replace": 1, **SLIDING}),
    "hunyuan_v1_moe": TinyCase(
        "hunyuan_v1_moe", {"head_dim": 16, "intermediate_size": 64, "num_experts": 8, "moe_topk": 2}
    ),
    "hy_v3": TinyCase("hy_v3", {**FINE}),
    "afmoe": TinyCase("afmoe", {**FINE, "num_dense_layers": 1, **SLIDING}),
    "exaone_moe": TinyCase(
        "exaone_moe", {**FINE, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, **SLIDING}
    ),
    "flex_olmo": TinyCase("flex_olmo", {"intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 3}),
    "cohere2_moe": TinyCase(
        "cohere2_moe",
        {"head_dim": 16, "intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2, **SLIDING},
    ),
    "granitemoeshared": TinyCase(
        "granitemoeshared",
        {
            "intermediate_size": 64,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 48,
            "residual_multiplier": 0.5,
        },
    ),
    "granitemoe_swa": TinyCase(
        "granitemoe_swa",
        {"intermediate_size": 64, "num_local_experts": 8, "num_experts_per_tok": 2, **SLIDING},
    ),
    "mellum": TinyCase("mellum", {**FINE, **SLIDING}),
    "laguna": TinyCase("laguna", {**FINE, "shared_expert_intermediate_size": 48, **SLIDING}),
    "solar_open": TinyCase("solar_open", {**GROUPED}),
    "mimo_v2_flash": TinyCase("mimo_v2_flash", {**GROUPED, **SLIDING}),
    "axk1": TinyCase(
        "axk1",
        {
            **LATENT_ATTENTION,
            "head_dim": 8,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "intermediate_size": 96,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "flint": TinyCase("flint", {**FINE, **SLIDING}),
    "kolibri1": TinyCase("kolibri1", {**FINE, **SLIDING}, seed=3),
    "qwen3_next": TinyCase("qwen3_next", {**FINE, "shared_expert_intermediate_size": 48, **DELTA_NET}),
    "qwen3_5_moe": TinyCase("qwen3_5_moe_text", {**FINE, "shared_expert_intermediate_size": 48, **DELTA_NET}),
    "granitemoehybrid": TinyCase(
        "granitemoehybrid",
        {
            "intermediate_size": 64,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 48,
            "layer_types": ["mamba", "mamba", "attention"],
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
        },
    ),
    "lfm2_moe": TinyCase(
        "lfm2_moe",
        {
            "moe_intermediate_size": 64,
            "intermediate_size": 96,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "num_dense_layers": 1,
            "layer_types": ["conv", "conv", "full_attention"],
        },
    ),
    "jamba": TinyCase(
        "jamba",
        {
            "intermediate_size": 64,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 0,
            "mamba_dt_rank": 8,
            "use_mamba_kernels": False,
        },
    ),
    "kimi_linear": TinyCase(
        "kimi_linear", {**KIMI, "q_lora_rank": None, "mlp_layer_types": ["dense", "sparse", "sparse"]}
    ),
    "bailing_hybrid": TinyCase("bailing_hybrid", {**KIMI, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}),
    # Blocks end within the prompts.
    "minimax": TinyCase(
        "minimax",
        {
            "head_dim": 16,
            "intermediate_size": 64,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "block_size": 32,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
            "linear_attn_alpha_factor": 1.5,
            "mlp_beta_factor": 0.5,
        },
    ),
    # Wider heads in the full layer, whose values are its keys; inputs per layer from a table of their own.
    "gemma4": TinyCase(
        "gemma4_text",
        {
            "head_dim": 16,
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "enable_moe_block": True,
            "num_experts": 8,
            "top_k_experts": 2,
            "moe_intermediate_size": 64,
            "intermediate_size": 96,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
            "num_kv_shared_layers": 0,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    # Experts see a projection of half the width, as in Nemotron-3 Super.
    "nemotron_h": TinyCase(
        "nemotron_h",
        {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "linear_attention"],
            "head_dim": 16,
            "n_routed_experts": 16,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 96,
            "moe_latent_size": 32,
            "moe_shared_expert_intermediate_size": 48,
            "n_group": 2,
            "topk_group": 1,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 1,
        },
    ),
    "qwen3_vl_moe": TinyCase(
        "qwen3_vl_moe", {**FINE, "decoder_sparse_step": 1, **rope_of_images(3, 3, 2)}, tower=TOWER
    ),
    "qwen3_omni_moe": TinyCase(
        "qwen3_omni_moe_thinker", {**FINE, **rope_of_images(3, 3, 2)}, tower=TOWER, outside=SPEECH
    ),
    "glm4v_moe": TinyCase("glm4v_moe", {**GROUPED, "first_k_dense_replace": 1, **rope_of_images(2, 1, 1)}, tower=TOWER),
    "beam": TinyCase(
        "beam", {**FINE, "n_group": 2, "topk_group": 1, "mlp_layer_types": ["dense", "sparse", "sparse"], **SLIDING}
    ),
    "aria": TinyCase("aria_text", {"intermediate_size": 64, "moe_num_experts": 8, "moe_topk": 2}),
    "mistral4": TinyCase("mistral4", {**LATENT_ATTENTION, **DEEPSEEK_EXPERTS, "head_dim": 24}),
    # More tokens than the indexer chooses, in prompts and in answers.
    "deepseek_v32": TinyCase("deepseek_v32", {**LATENT_ATTENTION, **DEEPSEEK_EXPERTS, **INDEXER}),
    # Windows of 4 and of 8 tokens; more entries than the indexer chooses; the first layer routes by token.
    "deepseek_v4": TinyCase(
        "deepseek_v4",
        {
            "num_key_value_heads": 1,
            "head_dim": 16,
            "partial_rotary_factor": 0.5,
            "q_lora_rank": 32,
            "o_groups": 2,
            "o_lora_rank": 16,
            "moe_intermediate_size": 64,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
            "mlp_layer_types": ["hash_moe", "moe", "moe"],
            "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
            "sliding_window": WINDOW,
            "index_n_heads": 4,
            "index_head_dim": 16,
            "index_topk": 6,
            "hc_mult": 2,
            "hc_sinkhorn_iters": 4,
            "swiglu_limit": 1.0,
        },
    ),
    "axk2": TinyCase("axk2", {**LATENT_ATTENTION, **DEEPSEEK_EXPERTS, **INDEXER, "gated_norm_rank": 8}),
    "axk2_light": TinyCase(
        "axk2", {**LATENT_ATTENTION, **DEEPSEEK_EXPERTS, **INDEXER, "n_group": None, "topk_group": None}, seed=1
    ),
    "glm_moe_dsa": TinyCase(
        "glm_moe_dsa",
        {**LATENT_ATTENTION, **DEEPSEEK_EXPERTS, **INDEXER, "indexer_types": ["full", "shared", "full"]},
    ),
    # Chunks end within the prompts; the last layer has no positions and scales its queries every 32 tokens.
    "llama4": TinyCase(
        "llama4_text",
        {
            "head_dim": 16,
            "intermediate_size": 64,
            "intermediate_size_mlp": 96,
            "num_local_experts": 8,
            "moe_layers": [1, 2],
            "no_rope_layers": [1, 1, 0],
            "attention_chunk_size": WINDOW,
            "floor_scale": 32,
        },
    ),
}
