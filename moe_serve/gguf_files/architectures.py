"""What config.json would say: one function per GGUF architecture, from metadata and tensors' shapes.

What a file does not record is what llama.cpp has built in for the architecture. Where both a tensor and a metadata
field tell a size, the tensor is asked.
"""

from __future__ import annotations

from collections.abc import Callable

from moe_serve.errors import UnsupportedModelError
from moe_serve.gguf_files.config_parts import (
    common_of,
    experts_of,
    head_dim_of,
    partial_rotary_of,
    rope_of,
    shared_width_of,
)
from moe_serve.gguf_files.fields import Config, Fields
from moe_serve.gguf_files.hybrids import HYBRIDS

SIGMOID = 2
"""llama.cpp's number, in `expert_gating_func`."""


def config_of(fields: Fields) -> Config:
    """The fields of config.json. UnsupportedModelError lists the architectures that are read."""
    architecture = fields.gguf.architecture
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{fields.where}: GGUF architecture {architecture!r}; moe-serve reads {', '.join(sorted(ARCHITECTURES))}"
        )
    return {**common_of(fields), **ARCHITECTURES[architecture](fields)}


def _mixtral(f: Fields) -> Config:
    return {"model_type": "mixtral", **head_dim_of(f), **experts_of(f, "num_local_experts", "intermediate_size")}


def _qwen2_moe(f: Fields) -> Config:
    experts = experts_of(f, "num_experts", "moe_intermediate_size")
    shared = {"shared_expert_intermediate_size": shared_width_of(f)}
    return {"model_type": "qwen2_moe", "norm_topk_prob": False, **experts, **shared}


def _qwen3_moe(f: Fields) -> Config:
    experts = experts_of(f, "num_experts", "moe_intermediate_size")
    return {"model_type": "qwen3_moe", "norm_topk_prob": True, **head_dim_of(f), **experts}


def _olmoe(f: Fields) -> Config:
    clip = {"clip_qkv": f.get("attention.clamp_kqv") or None}
    return {"model_type": "olmoe", "norm_topk_prob": False, **clip, **experts_of(f, "num_experts", "intermediate_size")}


def _grouped(f: Fields) -> Config:
    """What DeepSeek's routers and their descendants have."""
    return {
        **experts_of(f, "n_routed_experts", "moe_intermediate_size"),
        "n_shared_experts": f.get("expert_shared_count", 0) or None,
        "first_k_dense_replace": f.get("leading_dense_block_count", 0),
        "routed_scaling_factor": f.get("expert_weights_scale") or 1.0,
        "norm_topk_prob": bool(f.get("expert_weights_norm", False)),
        "n_group": f.get("expert_group_count") or 1,
        "topk_group": f.get("expert_group_used_count") or 1,
    }


def _deepseek(f: Fields) -> Config:
    is_v3 = f.get("expert_gating_func") == SIGMOID or f.has("exp_probs_b.bias")
    rotary, heads = f.need("rope.dimension_count"), f.need("attention.head_count")
    config = {
        "model_type": "deepseek_v3" if is_v3 else "deepseek_v2",
        **_grouped(f),
        "num_key_value_heads": heads,
        "q_lora_rank": f.get("attention.q_lora_rank") or None,
        "kv_lora_rank": f.need("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": (f.get("attention.key_length_mla") or f.need("attention.key_length")) - rotary,
        "v_head_dim": f.get("attention.value_length_mla") or f.need("attention.value_length"),
        "rope_parameters": _deepseek_rope(f),
    }
    if not is_v3:
        config["topk_method"] = "greedy" if config["n_group"] == 1 else "group_limited_greedy"
    return config


def _deepseek_rope(f: Fields) -> Config:
    """llama.cpp keeps a tenth of `mscale_all_dim`; in all of DeepSeek's models `mscale` is the same."""
    multiplier = f.get("rope.scaling.yarn_log_multiplier")
    if multiplier is None:
        return rope_of(f)
    mscale = round(10 * multiplier, 6)
    return {**rope_of(f), "mscale": mscale, "mscale_all_dim": mscale}


def _glm4_moe(f: Fields) -> Config:
    head = head_dim_of(f)
    return {
        "model_type": "glm4_moe",
        **head,
        **_grouped(f),
        "attention_bias": f.has("attn_q.bias"),
        "use_qk_norm": f.has("attn_q_norm.weight"),
        "rope_parameters": partial_rotary_of(f, head["head_dim"]),
    }


def _dots1(f: Fields) -> Config:
    return {"model_type": "dots1", **head_dim_of(f), **_grouped(f)}


def _gpt_oss(f: Fields) -> Config:
    experts = experts_of(f, "num_local_experts", "intermediate_size")
    window = {"sliding_window": f.need("attention.sliding_window")}
    rope = {**rope_of(f), "truncate": False}
    return {"model_type": "gpt_oss", **head_dim_of(f), **experts, **window, "rope_parameters": rope}


def _minimax_m2(f: Fields) -> Config:
    head, experts = head_dim_of(f), experts_of(f, "num_local_experts", "intermediate_size")
    rotary = {"rotary_dim": f.get("rope.dimension_count", head["head_dim"])}
    return {
        "model_type": "minimax_m2",
        **head,
        **experts,
        **rotary,
        "rope_parameters": partial_rotary_of(f, head["head_dim"]),
    }


def _hunyuan(f: Fields) -> Config:
    experts = experts_of(f, "num_experts", "intermediate_size")
    return {"model_type": "hunyuan_v1_moe", **head_dim_of(f), **experts, "moe_topk": f.need("expert_used_count")}


def _ernie(f: Fields) -> Config:
    return {
        "model_type": "ernie4_5_moe",
        **head_dim_of(f),
        **experts_of(f, "moe_num_experts", "moe_intermediate_size"),
        "moe_k": f.need("expert_used_count"),
        "moe_num_shared_experts": f.get("expert_shared_count", 0),
        "moe_layer_start_index": f.get("leading_dense_block_count", 0),
        "moe_layer_interval": f.get("interleave_moe_layer_step", 1),
        "use_bias": f.has("attn_q.bias"),
    }


ARCHITECTURES: dict[str, Callable[[Fields], Config]] = {
    "llama": _mixtral,
    "qwen2moe": _qwen2_moe,
    "qwen3moe": _qwen3_moe,
    "olmoe": _olmoe,
    "deepseek2": _deepseek,
    "glm4moe": _glm4_moe,
    "dots1": _dots1,
    "gpt-oss": _gpt_oss,
    "minimax-m2": _minimax_m2,
    "hunyuan-moe": _hunyuan,
    "ernie4_5-moe": _ernie,
    **HYBRIDS,
}
"""By `general.architecture`."""
