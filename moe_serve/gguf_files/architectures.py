"""What config.json would say: one function per GGUF architecture, from metadata and tensors' shapes.

What a file does not record is what llama.cpp has built in for the architecture. Where both a tensor and a metadata
field tell a size, the tensor is asked.
"""

from __future__ import annotations

from collections.abc import Callable

from moe_serve.errors import CheckpointError, UnsupportedModelError
from moe_serve.gguf_files.fields import Config, Fields

SIGMOID = 2
"""llama.cpp's number, in `expert_gating_func`."""


def config_of(fields: Fields) -> Config:
    """The fields of config.json. UnsupportedModelError lists the architectures that are read."""
    architecture = fields.gguf.architecture
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{fields.where}: GGUF architecture {architecture!r}; moe-serve reads {', '.join(sorted(ARCHITECTURES))}"
        )
    return {**_common(fields), **ARCHITECTURES[architecture](fields)}


def _common(f: Fields) -> Config:
    heads = f.need("attention.head_count")
    return {
        "vocab_size": f.shape("token_embd.weight")[0],
        "hidden_size": f.need("embedding_length"),
        "intermediate_size": f.get("feed_forward_length") or None,
        "num_hidden_layers": f.need("block_count") - f.get("nextn_predict_layers", 0),
        "num_attention_heads": heads,
        "num_key_value_heads": f.get("attention.head_count_kv", heads),
        "max_position_embeddings": f.need("context_length"),
        "rms_norm_eps": f.get("attention.layer_norm_rms_epsilon", 1e-6),
        "num_experts_per_tok": f.need("expert_used_count"),
        "rope_parameters": _rope(f),
        "tie_word_embeddings": "output.weight" not in f.gguf.tensors,
        "bos_token_id": f.token("bos"),
        "eos_token_id": _ends(f),
        "pad_token_id": f.token("padding"),
        "dtype": "bfloat16",  # of what a GPU computes in; the tensors have types of their own
    }


def _ends(f: Fields) -> int | list[int] | None:
    """The tokens that end a text or a turn."""
    ends = sorted({number for name in ("eos", "eot", "eom") if (number := f.token(name)) is not None})
    return ends if len(ends) > 1 else next(iter(ends), None)


def _rope(f: Fields) -> Config:
    rope: Config = {"rope_type": "default", "rope_theta": f.get("rope.freq_base", 10000.0)}
    kind = f.get("rope.scaling.type", "none")
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        raise CheckpointError(f"{f.where}: rope.scaling.type is {kind!r}; moe-serve reads linear and yarn")
    rope |= {"rope_type": kind, "factor": f.need("rope.scaling.factor")}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = f.need("rope.scaling.original_context_length")
        for name in ("beta_fast", "beta_slow"):
            if (value := f.get(f"rope.scaling.yarn_{name}")) is not None:
                rope[name] = value
    return rope


def _head_dim(f: Fields) -> Config:
    return {"head_dim": f.get("attention.key_length") or f.need("embedding_length") // f.need("attention.head_count")}


def _experts(f: Fields, count: str, width: str) -> Config:
    """Number and width of the experts under the family's names."""
    if f.has("ffn_down.0.weight"):  # before llama.cpp joined a layer's experts in one tensor (2024)
        return {count: f.need("expert_count"), width: f.shape("ffn_down.0.weight")[1]}
    experts, _, inner = f.shape("ffn_down_exps.weight")
    return {count: experts, width: inner}


def _shared_width(f: Fields) -> int:
    return f.shape("ffn_down_shexp.weight")[1]


def _mixtral(f: Fields) -> Config:
    return {"model_type": "mixtral", **_head_dim(f), **_experts(f, "num_local_experts", "intermediate_size")}


def _qwen2_moe(f: Fields) -> Config:
    experts = _experts(f, "num_experts", "moe_intermediate_size")
    shared = {"shared_expert_intermediate_size": _shared_width(f)}
    return {"model_type": "qwen2_moe", "norm_topk_prob": False, **experts, **shared}


def _qwen3_moe(f: Fields) -> Config:
    experts = _experts(f, "num_experts", "moe_intermediate_size")
    return {"model_type": "qwen3_moe", "norm_topk_prob": True, **_head_dim(f), **experts}


def _olmoe(f: Fields) -> Config:
    clip = {"clip_qkv": f.get("attention.clamp_kqv") or None}
    return {"model_type": "olmoe", "norm_topk_prob": False, **clip, **_experts(f, "num_experts", "intermediate_size")}


def _grouped(f: Fields) -> Config:
    """What DeepSeek's routers and their descendants have."""
    return {
        **_experts(f, "n_routed_experts", "moe_intermediate_size"),
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
        return _rope(f)
    mscale = round(10 * multiplier, 6)
    return {**_rope(f), "mscale": mscale, "mscale_all_dim": mscale}


def _partial_rotary(f: Fields, head_dim: int) -> Config:
    return {**_rope(f), "partial_rotary_factor": f.get("rope.dimension_count", head_dim) / head_dim}


def _glm4_moe(f: Fields) -> Config:
    head = _head_dim(f)
    return {
        "model_type": "glm4_moe",
        **head,
        **_grouped(f),
        "attention_bias": f.has("attn_q.bias"),
        "use_qk_norm": f.has("attn_q_norm.weight"),
        "rope_parameters": _partial_rotary(f, head["head_dim"]),
    }


def _dots1(f: Fields) -> Config:
    return {"model_type": "dots1", **_head_dim(f), **_grouped(f)}


def _gpt_oss(f: Fields) -> Config:
    experts = _experts(f, "num_local_experts", "intermediate_size")
    window = {"sliding_window": f.need("attention.sliding_window")}
    rope = {**_rope(f), "truncate": False}
    return {"model_type": "gpt_oss", **_head_dim(f), **experts, **window, "rope_parameters": rope}


def _minimax_m2(f: Fields) -> Config:
    head, experts = _head_dim(f), _experts(f, "num_local_experts", "intermediate_size")
    rotary = {"rotary_dim": f.get("rope.dimension_count", head["head_dim"])}
    return {
        "model_type": "minimax_m2",
        **head,
        **experts,
        **rotary,
        "rope_parameters": _partial_rotary(f, head["head_dim"]),
    }


def _hunyuan(f: Fields) -> Config:
    experts = _experts(f, "num_experts", "intermediate_size")
    return {"model_type": "hunyuan_v1_moe", **_head_dim(f), **experts, "moe_topk": f.need("expert_used_count")}


def _ernie(f: Fields) -> Config:
    return {
        "model_type": "ernie4_5_moe",
        **_head_dim(f),
        **_experts(f, "moe_num_experts", "moe_intermediate_size"),
        "moe_k": f.need("expert_used_count"),
        "moe_num_shared_experts": f.get("expert_shared_count", 0),
        "moe_layer_start_index": f.get("leading_dense_block_count", 0),
        "moe_layer_interval": f.get("interleave_moe_layer_step", 1),
        "use_bias": f.has("attn_q.bias"),
    }


def _granite_moe(f: Fields) -> Config:
    if f.has("ffn_down_shexp.weight"):
        raise UnsupportedModelError(f"{f.where}: granitemoe with shared experts is not read from GGUF files")
    return {
        "model_type": "granitemoe",
        **_experts(f, "num_local_experts", "intermediate_size"),
        "embedding_multiplier": f.get("embedding_scale", 1.0),
        "residual_multiplier": f.get("residual_scale", 1.0),
        "attention_multiplier": f.get("attention.scale", 1.0),
        "logits_scaling": f.get("logit_scale", 1.0),
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
    "granitemoe": _granite_moe,
}
"""By `general.architecture`."""
