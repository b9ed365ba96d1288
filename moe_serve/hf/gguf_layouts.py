"""How llama.cpp keeps tensors of models with recurrent layers: under which names, joined or apart, in which order.

Everything here leads from a GGUF file's tensors to transformers' parameters. Values that llama.cpp keeps as results
(-exp(A), w + 1) come back to the last bit or two. Knows names and shapes; reads no files.

Shape alphabet: H hidden, D values of a head.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

Tensors = Sequence[torch.Tensor]

NAMES: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...] = tuple(
    (re.compile(rf"layers\.(\d+)\.{parameter}$"), names)
    for parameter, names in (
        (r"(?:linear_attn|mamba|mixer)\.dt_bias", ("ssm_dt.bias",)),
        (r"(?:linear_attn|mamba|mixer)\.A_log", ("ssm_a",)),
        (r"mixer\.D", ("ssm_d",)),
        (r"linear_attn\.in_proj_qkvz\.weight", ("attn_qkv.weight", "attn_gate.weight")),
        (r"shared_mlp\.input_linear\.weight", ("ffn_gate_shexp.weight", "ffn_up_shexp.weight")),
        (r"feed_forward\.expert_bias", ("exp_probs_b.bias",)),
        (r"mixer\.gate\.weight", ("ffn_gate_inp.weight",)),
        (r"mixer\.gate\.e_score_correction_bias", ("exp_probs_b.bias",)),
        (r"mixer\.fc1_latent_proj\.weight", ("ffn_latent_down.weight",)),
        (r"mixer\.fc2_latent_proj\.weight", ("ffn_latent_up.weight",)),
    )
)
"""End of a parameter's name -> the tensors of its layer that hold it, where the gguf package does not know."""
WITHOUT_ONE = re.compile(r"^(attn_norm|post_attention_norm|attn_q_norm|attn_k_norm|output_norm)\.weight$")
"""Qwen's norms multiply by 1 + w; llama.cpp keeps 1 + w."""
TILED_ROWS = re.compile(r"^(attn_gate\.weight|ssm_(alpha|beta)\.weight|ssm_a|ssm_dt\.bias)$")
DELTA_NETS = ("qwen3next", "qwen35moe")


def sources_of(parameter: str) -> tuple[str, ...]:
    """The tensors that hold a parameter, as a file names them; empty where the gguf package is to be asked."""
    for pattern, names in NAMES:
        if match := pattern.search(parameter):
            return tuple(f"blk.{match[1]}.{name}" for name in names)
    return ()


def joined(parameter: str, tensors: Tensors, hf_config: Any) -> torch.Tensor:
    """What `sources_of` named, as one parameter."""
    if parameter.endswith("in_proj_qkvz.weight"):
        return _by_key_head(tensors, hf_config)
    return torch.cat(list(tensors))


def is_changed(architecture: str, name: str) -> bool:
    """Whether `undone` changes a matrix."""
    matrix = r"^blk\.\d+\.(attn_gate|attn_qkv|ssm_alpha|ssm_beta|ssm_out|ssm_conv1d)\.weight$"
    return architecture == "qwen35moe" and re.match(matrix, name) is not None


def undone(architecture: str, name: str, values: torch.Tensor, hf_config: Any) -> torch.Tensor:
    """A tensor of the file without what llama.cpp's converter did to it."""
    name = re.sub(r"^blk\.\d+\.", "", name)
    if architecture in DELTA_NETS and WITHOUT_ONE.match(name):
        return values - 1
    if architecture == "qwen35moe":
        values = _grouped_heads(name, values, hf_config)
    return torch.log(-values) if name == "ssm_a" else values


def _by_key_head(tensors: Tensors, hf_config: Any) -> torch.Tensor:
    """Rows of all queries, keys and values, and of the gates -> by key head: its query, key, values and gates."""
    heads, width = hf_config.linear_num_key_heads, hf_config.linear_key_head_dim
    mixed, gates = tensors
    queries, keys, values = mixed.split([heads * width, heads * width, len(mixed) - 2 * heads * width])
    parts = [part.unflatten(0, (heads, -1)) for part in (queries, keys, values, gates)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def _grouped_heads(name: str, values: torch.Tensor, hf_config: Any) -> torch.Tensor:
    """Value heads, kept in turns over the key heads, back beside the key head that they belong to."""
    keys, heads = hf_config.linear_num_key_heads, hf_config.linear_num_value_heads
    order = torch.arange(heads).view(heads // keys, keys).T.flatten()

    def reorder(rows: torch.Tensor) -> torch.Tensor:
        by_head: torch.Tensor = rows.unflatten(0, (heads, -1))
        return by_head[order].flatten(0, 1)

    if TILED_ROWS.match(name):
        return reorder(values)
    if name == "ssm_out.weight":
        return reorder(values.T).T.contiguous()
    if name in ("attn_qkv.weight", "ssm_conv1d.weight"):
        before = 2 * keys * hf_config.linear_key_head_dim
        return torch.cat([values[:before], reorder(values[before:])])
    return values
