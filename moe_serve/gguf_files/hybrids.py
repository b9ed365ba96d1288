"""What config.json would say for models with recurrent layers, and for Granite: one function per GGUF architecture.

Which kind a layer is of is seen from its tensors.
"""

from __future__ import annotations

from collections.abc import Callable

from moe_serve.errors import CheckpointError
from moe_serve.gguf_files.config_parts import experts_of, head_dim_of, partial_rotary_of, rope_of, shared_width_of
from moe_serve.gguf_files.fields import Config, Fields

ATTENTION = "attn_k.weight"
"""The tensor that only layers with attention have."""


def _kinds(f: Fields, attention: str, other: str) -> list[str]:
    """One word per decoder layer."""
    attending = set(f.layers_with(ATTENTION))
    layers = f.need("block_count") - f.get("nextn_predict_layers", 0)
    return [attention if layer in attending else other for layer in range(layers)]


def _qwen_delta_net(f: Fields, model_type: str) -> Config:
    head, value_heads = head_dim_of(f), f.need("ssm.time_step_rank")
    return {
        "model_type": model_type,
        **head,
        **experts_of(f, "num_experts", "moe_intermediate_size"),
        "shared_expert_intermediate_size": shared_width_of(f),
        "norm_topk_prob": True,
        "rope_parameters": partial_rotary_of(f, head["head_dim"]),
        "layer_types": _kinds(f, "full_attention", "linear_attention"),
        "linear_num_key_heads": f.need("ssm.group_count"),
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": f.need("ssm.state_size"),
        "linear_value_head_dim": f.need("ssm.inner_size") // value_heads,
        "linear_conv_kernel_dim": f.need("ssm.conv_kernel"),
    }


def _lfm2_moe(f: Fields) -> Config:
    return {
        "model_type": "lfm2_moe",
        **experts_of(f, "num_experts", "moe_intermediate_size"),
        "num_dense_layers": f.get("leading_dense_block_count", 0),
        "norm_eps": f.need("attention.layer_norm_rms_epsilon"),
        "conv_L_cache": f.need("shortconv.l_cache"),
        "layer_types": _kinds(f, "full_attention", "conv"),
        "use_expert_bias": f.has("exp_probs_b.bias"),
        "norm_topk_prob": True,
    }


def _jamba(f: Fields) -> Config:
    attention, moe = (_every(f, ending) for ending in (ATTENTION, "ffn_down_exps.weight"))
    return {
        "model_type": "jamba",
        **experts_of(f, "num_experts", "intermediate_size"),
        "attn_layer_offset": attention[0],
        "attn_layer_period": attention[1],
        "expert_layer_offset": moe[0],
        "expert_layer_period": moe[1],
        "mamba_d_state": f.need("ssm.state_size"),
        "mamba_d_conv": f.need("ssm.conv_kernel"),
        "mamba_expand": f.need("ssm.inner_size") // f.need("embedding_length"),
        "mamba_dt_rank": f.need("ssm.time_step_rank"),
        "mamba_conv_bias": f.has("ssm_conv1d.bias"),
        "mamba_proj_bias": f.has("ssm_in.bias"),
    }


def _every(f: Fields, ending: str) -> tuple[int, int]:
    """(first, distance) of the layers with such a tensor. CheckpointError: their distances differ."""
    found, layers = f.layers_with(ending), f.need("block_count")
    first, distance = found[0], found[1] - found[0] if len(found) > 1 else layers
    if found != list(range(first, layers, distance)):
        raise CheckpointError(f"{f.where}: layers {found} have {ending}; jamba has them at equal distances")
    return first, distance


def _mamba2(f: Fields) -> Config:
    heads, inner = f.need("ssm.time_step_rank"), f.need("ssm.inner_size")
    return {
        "mamba_n_heads": heads,
        "mamba_d_head": inner // heads,
        "mamba_expand": inner // f.need("embedding_length"),
        "mamba_n_groups": f.need("ssm.group_count"),
        "mamba_d_state": f.need("ssm.state_size"),
        "mamba_d_conv": f.need("ssm.conv_kernel"),
        "mamba_conv_bias": f.has("ssm_conv1d.bias"),
        "mamba_proj_bias": f.has("ssm_in.bias"),
    }


def _granite_moe(f: Fields) -> Config:
    shared = {"shared_intermediate_size": shared_width_of(f)} if f.has("ffn_down_shexp.weight") else {}
    return {
        "model_type": "granitemoeshared" if shared else "granitemoe",
        **shared,
        **experts_of(f, "num_local_experts", "intermediate_size"),
        "embedding_multiplier": f.get("embedding_scale", 1.0),
        "residual_multiplier": f.get("residual_scale", 1.0),
        "attention_multiplier": f.get("attention.scale", 1.0),
        "logits_scaling": f.get("logit_scale", 1.0),
    }


def _granite_hybrid(f: Fields) -> Config:
    return {
        "shared_intermediate_size": 0,
        **_granite_moe(f),
        "model_type": "granitemoehybrid",
        **_mamba2(f),
        "layer_types": _kinds(f, "attention", "mamba"),
        "position_embedding_type": "rope" if f.get("rope.scaling.finetuned", True) else None,
    }


def _nemotron_h(f: Fields) -> Config:
    mamba = _mamba2(f)
    renamed = {"mamba_n_heads": "mamba_num_heads", "mamba_d_head": "mamba_head_dim", "mamba_n_groups": "n_groups"}
    renamed |= {"mamba_d_state": "ssm_state_size", "mamba_d_conv": "conv_kernel", "mamba_conv_bias": "use_conv_bias"}
    experts, _, inner = f.shape("ffn_down_exps.weight")
    return {
        "model_type": "nemotron_h",
        **head_dim_of(f),
        **{name: mamba[old] for old, name in renamed.items()},
        "expand": mamba["mamba_expand"],
        "layers_block_type": _nemotron_kinds(f),
        "layer_norm_epsilon": f.get("attention.layer_norm_rms_epsilon") or f.need("attention.layer_norm_epsilon"),
        "n_routed_experts": experts,
        "moe_intermediate_size": inner,
        "moe_latent_size": f.get("moe_latent_size"),
        "n_shared_experts": f.get("expert_shared_count", 1),
        "moe_shared_expert_intermediate_size": shared_width_of(f),
        "routed_scaling_factor": f.get("expert_weights_scale") or 1.0,
        "norm_topk_prob": bool(f.get("expert_weights_norm", False)),
        "n_group": f.get("expert_group_count") or 1,
        "topk_group": f.get("expert_group_used_count") or 1,
        "rope_parameters": rope_of(f),
    }


def _nemotron_kinds(f: Fields) -> list[str]:
    kinds = _kinds(f, "full_attention", "linear_attention")
    for word, ending in (("moe", "ffn_down_exps.weight"), ("mlp", "ffn_down.weight")):
        for layer in f.layers_with(ending):
            if layer < len(kinds):
                kinds[layer] = word
    return kinds


HYBRIDS: dict[str, Callable[[Fields], Config]] = {
    "qwen3next": lambda f: _qwen_delta_net(f, "qwen3_next"),
    "qwen35moe": lambda f: _qwen_delta_net(f, "qwen3_5_moe_text"),
    "lfm2moe": _lfm2_moe,
    "jamba": _jamba,
    "granitemoe": _granite_moe,
    "granitehybrid": _granite_hybrid,
    "nemotron_h_moe": _nemotron_h,
}
"""By `general.architecture`."""
