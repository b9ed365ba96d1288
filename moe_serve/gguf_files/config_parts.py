"""The fields of config.json that many GGUF architectures tell in the same way."""

from __future__ import annotations

from moe_serve.errors import CheckpointError
from moe_serve.gguf_files.fields import Config, Fields


def common_of(f: Fields) -> Config:
    """What is read in the same way for all architectures."""
    heads = f.need("attention.head_count")
    return {
        "vocab_size": f.shape("token_embd.weight")[0],
        "hidden_size": f.need("embedding_length"),
        "intermediate_size": f.largest("feed_forward_length", 0) or None,
        "num_hidden_layers": f.need("block_count") - f.get("nextn_predict_layers", 0),
        "num_attention_heads": heads,
        "num_key_value_heads": f.largest("attention.head_count_kv", heads),
        "max_position_embeddings": f.need("context_length"),
        "rms_norm_eps": f.get("attention.layer_norm_rms_epsilon", 1e-6),
        "num_experts_per_tok": f.need("expert_used_count"),
        "rope_parameters": rope_of(f),
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


def rope_of(f: Fields) -> Config:
    """`rope_parameters`. CheckpointError: a scaling that is not read."""
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


def head_dim_of(f: Fields) -> Config:
    """The width of a head, as a field of its own."""
    return {"head_dim": f.get("attention.key_length") or f.need("embedding_length") // f.need("attention.head_count")}


def experts_of(f: Fields, count: str, width: str) -> Config:
    """Number and width of the experts under the family's names."""
    if f.has("ffn_down.0.weight"):  # before llama.cpp joined a layer's experts in one tensor (2024)
        return {count: f.need("expert_count"), width: f.shape("ffn_down.0.weight")[1]}
    experts, _, inner = f.shape("ffn_down_exps.weight")
    return {count: experts, width: inner}


def shared_width_of(f: Fields) -> int:
    """Of the shared experts of a layer, taken together."""
    return f.shape("ffn_down_shexp.weight")[1]


def partial_rotary_of(f: Fields, head_dim: int) -> Config:
    """`rope_parameters` of heads that are rotated in part."""
    return {**rope_of(f), "partial_rotary_factor": f.get("rope.dimension_count", head_dim) / head_dim}
