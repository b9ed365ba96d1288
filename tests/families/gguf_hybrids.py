"""How llama.cpp's converter writes models with recurrent layers: names, orders of rows, values and metadata.

Written from the converter's facts, the other way round than moe_serve reads them. Knows nothing of moe_serve.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
ARCHITECTURES = {
    "qwen3_next": "qwen3next",
    "qwen3_5_moe_text": "qwen35moe",
    "lfm2_moe": "lfm2moe",
    "jamba": "jamba",
    "granitemoeshared": "granitemoe",
    "granitemoehybrid": "granitehybrid",
    "nemotron_h": "nemotron_h_moe",
}
NAMES = {
    "dt_bias": "ssm_dt.bias",
    "A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.out_proj.weight": "ssm_out.weight",
    "mixer.norm.weight": "ssm_norm.weight",
    "mixer.gate.weight": "ffn_gate_inp.weight",
    "mixer.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mixer.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mixer.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
    "mixer.fc1_latent_proj.weight": "ffn_latent_down.weight",
    "mixer.fc2_latent_proj.weight": "ffn_latent_up.weight",
    "mixer.q_proj.weight": "attn_q.weight",
    "mixer.k_proj.weight": "attn_k.weight",
    "mixer.v_proj.weight": "attn_v.weight",
    "mixer.o_proj.weight": "attn_output.weight",
    "feed_forward.expert_bias": "exp_probs_b.bias",
}
"""End of transformers' name -> llama.cpp's."""
QWEN_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}


def stored_as(architecture: str, key: str, values: Array, config: Any) -> list[tuple[str, Array]]:
    """(name, values) of the tensors that hold a parameter; none: it is stored under its usual name, as it is."""
    if architecture in ("qwen3next", "qwen35moe") and (plus_one := _qwen_norm(key)) is not None:
        return [(plus_one, values + 1)]
    match = re.search(r"layers\.(\d+)\.(.+)$", key)
    if match is None:
        return []
    prefix, rest = f"blk.{match[1]}.", match[2]
    if architecture == "qwen35moe":
        values = _value_heads_in_turns(rest, values, config)
    if rest == "linear_attn.in_proj_qkvz.weight":
        mixed, gates = _apart(values, config)
        return [(f"{prefix}attn_qkv.weight", mixed), (f"{prefix}attn_gate.weight", gates)]
    if rest == "shared_mlp.input_linear.weight":
        gate, up = np.split(values, 2)
        return [(f"{prefix}ffn_gate_shexp.weight", gate), (f"{prefix}ffn_up_shexp.weight", up)]
    if rest.endswith("A_log"):
        values = -np.exp(values)
    name = next((name for ending, name in NAMES.items() if rest.endswith(ending)), None)
    if name is None and architecture == "qwen35moe" and rest.startswith("linear_attn."):
        name = QWEN35[rest.removeprefix("linear_attn.")]
    return [] if name is None else [(prefix + name, values.squeeze())]


QWEN35 = {
    "conv1d.weight": "ssm_conv1d.weight",
    "norm.weight": "ssm_norm.weight",
    "out_proj.weight": "ssm_out.weight",
    "in_proj_qkv.weight": "attn_qkv.weight",
    "in_proj_z.weight": "attn_gate.weight",
    "in_proj_b.weight": "ssm_beta.weight",
    "in_proj_a.weight": "ssm_alpha.weight",
}


def _qwen_norm(key: str) -> str | None:
    if key == "model.norm.weight":
        return "output_norm.weight"
    match = re.match(r"model\.layers\.(\d+)\.(.+)\.weight$", key)
    name = QWEN_NORMS.get(match[2]) if match else None
    return f"blk.{match[1]}.{name}.weight" if match and name else None


def _value_heads_in_turns(rest: str, values: Array, config: Any) -> Array:
    """Head v of key head k, at k * n + v in transformers, goes to v * keys + k."""
    keys, heads = config.linear_num_key_heads, config.linear_num_value_heads
    order = [k * (heads // keys) + v for v in range(heads // keys) for k in range(keys)]

    def turned(rows: Array) -> Array:
        by_head = rows.reshape(heads, -1, *rows.shape[1:])
        return by_head[order].reshape(rows.shape)

    if rest == "linear_attn.out_proj.weight":
        return np.ascontiguousarray(turned(values.T).T)
    if rest in ("linear_attn.in_proj_qkv.weight", "linear_attn.conv1d.weight"):
        start = 2 * keys * config.linear_key_head_dim
        return np.concatenate([values[:start], turned(values[start:])])
    if re.match(r"linear_attn\.(in_proj_[zab]\.weight|A_log|dt_bias)$", rest):
        return turned(values)
    return values


def _apart(rows: Array, config: Any) -> tuple[Array, Array]:
    """Qwen3-Next's rows by key head -> those of all queries, keys and values, and those of the gates."""
    keys, width = config.linear_num_key_heads, config.linear_key_head_dim
    more = config.linear_num_value_heads // keys * config.linear_value_head_dim
    by_head = rows.reshape(keys, 2 * width + 2 * more, -1)
    ends = np.cumsum([width, width, more])
    parts = [part.reshape(-1, rows.shape[1]) for part in np.split(by_head, ends, axis=1)]
    return np.concatenate(parts[:3]), np.ascontiguousarray(parts[3])


def heads_by_layer(config: Any) -> int | list[int]:
    """Key and value heads: a number, or one per layer where some have no attention."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if config.model_type not in ARCHITECTURES or not kinds:
        return int(config.num_key_value_heads)
    return [config.num_key_value_heads if kind in ("attention", "full_attention") else 0 for kind in kinds]


def _delta_net(writer: gguf.GGUFWriter, config: Any, _: Any) -> None:
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)


def _lfm2(writer: gguf.GGUFWriter, config: Any, _: Any) -> None:
    writer.add_shortconv_l_cache(config.conv_L_cache)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_leading_dense_block_count(config.num_dense_layers)


def _jamba(writer: gguf.GGUFWriter, config: Any, _: Any) -> None:
    writer.add_ssm_conv_kernel(config.mamba_d_conv)
    writer.add_ssm_inner_size(config.mamba_expand * config.hidden_size)
    writer.add_ssm_state_size(config.mamba_d_state)
    writer.add_ssm_time_step_rank(config.mamba_dt_rank)


def granite(writer: gguf.GGUFWriter, config: Any, _: Any) -> None:
    """Of all Granites."""
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def _granite_hybrid(writer: gguf.GGUFWriter, config: Any, types: Any) -> None:
    granite(writer, config, types)
    writer.add_rope_scaling_finetuned(config.position_embedding_type == "rope")
    _mamba2(writer, config.mamba_n_heads, config.mamba_d_head, config.mamba_n_groups)
    writer.add_ssm_state_size(config.mamba_d_state)
    writer.add_ssm_conv_kernel(config.mamba_d_conv)


def _nemotron(writer: gguf.GGUFWriter, config: Any, _: Any) -> None:
    _mamba2(writer, config.mamba_num_heads, config.mamba_head_dim, config.n_groups)
    writer.add_ssm_state_size(config.ssm_state_size)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_moe_latent_size(config.moe_latent_size)


def _mamba2(writer: gguf.GGUFWriter, heads: int, width: int, groups: int) -> None:
    writer.add_ssm_time_step_rank(heads)
    writer.add_ssm_inner_size(heads * width)
    writer.add_ssm_group_count(groups)


METADATA: dict[str, Callable[[gguf.GGUFWriter, Any, Any], None]] = {
    "qwen3_next": _delta_net,
    "qwen3_5_moe_text": _delta_net,
    "lfm2_moe": _lfm2,
    "jamba": _jamba,
    "granitemoeshared": granite,
    "granitemoehybrid": _granite_hybrid,
    "nemotron_h": _nemotron,
}
"""By model_type."""
