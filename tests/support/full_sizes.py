"""Four models at their full width, four layers deep: what their authors published, as transformers' config fields."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from moe_serve.execution.step_memory import StepShape
from moe_serve.spec import ModelSpec

LAYERS = 4
ALL_LAYERS = {"mixtral": 32, "qwen3_moe": 48, "gpt_oss": 24, "deepseek_v2": 27}
GRAPHS, SEQS = 38, 128
"""Of a server with default flags and contexts beyond 8,192 tokens."""

FIELDS: dict[str, dict[str, Any]] = {
    "mixtral": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "sliding_window": None,
    },
    "qwen3_moe": {
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "intermediate_size": 6144,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "decoder_sparse_step": 1,
    },
    "gpt_oss": {
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "vocab_size": 201088,
        "max_position_embeddings": 131072,
        "sliding_window": 128,
    },
    "deepseek_v2": {
        "hidden_size": 2048,
        "moe_intermediate_size": 1408,
        "intermediate_size": 10944,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "vocab_size": 102400,
        "max_position_embeddings": 163840,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
    },
}
"""Mixtral-8x7B, Qwen3-30B-A3B, GPT-OSS-20B, DeepSeek-V2-Lite; by model_type."""


def full_size(model_type: str) -> Any:
    """Its config, LAYERS deep."""
    return AutoConfig.for_model(model_type, num_hidden_layers=LAYERS, **FIELDS[model_type])


def step_shape(model_type: str, num_tokens: int) -> StepShape:
    """Its steps, with all its layers, in bf16."""
    config = full_size(model_type)
    spec = ModelSpec.from_hf(config)
    return StepShape(
        num_tokens=num_tokens,
        num_seqs=SEQS,
        num_graphs=GRAPHS,
        num_layers=ALL_LAYERS[model_type],
        hidden=spec.hidden_size,
        inner=spec.expert_intermediate_size,
        top_k=spec.top_k,
        vocab=spec.vocab_size,
        latent_dim=config.kv_lora_rank + config.qk_rope_head_dim if model_type == "deepseek_v2" else 0,
        max_model_len=spec.max_position_embeddings,
        itemsize=2,
    )
