"""GGUF files of the tiny models, written with the gguf package as llama.cpp's converter does, and their float twins.

A twin is the Hugging Face checkpoint with the values that the file's blocks stand for, by the gguf package's own
dequantisation. Types that the package cannot quantise to get random blocks. Knows nothing of moe_serve.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as T
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from . import gguf_hybrids
from .tiny_checkpoints import tiny_tokenizer

Array = NDArray[Any]
HALVES = {T.Q2_K: (80, 82), T.Q3_K: (108,), T.Q4_K: (0, 2), T.Q5_K: (0, 2), T.Q6_K: (208,), T.IQ4_XS: (0,)}
"""Where float16 scales are in the blocks of types that the package does not quantise to."""
LARGEST = {T.Q2_K: 45, T.Q3_K: 128, T.Q4_K: 945, T.Q5_K: 1953, T.Q6_K: 4096, T.IQ4_XS: 4064}
"""Largest product of a code and the whole-numbered part of its scale."""
PERMUTED = ("llama", "granitemoe", "granitehybrid", "nemotron_h_moe")
"""Whose queries and keys the converter writes with each head's halves interleaved."""
ARCHITECTURES = {
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "olmoe": "olmoe",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "glm4_moe": "glm4moe",
    "gpt_oss": "gpt-oss",
    "dots1": "dots1",
    "minimax_m2": "minimax-m2",
    "hunyuan_v1_moe": "hunyuan-moe",
    "ernie4_5_moe": "ernie4_5-moe",
    "granitemoe": "granitemoe",
    **gguf_hybrids.ARCHITECTURES,
}


@dataclass(frozen=True)
class Types:
    """ggml's types of a file's matrices; norms and routers are F32."""

    dense: T = T.F32
    gate: T = T.F32
    up: T = T.F32
    down: T = T.F32
    later: Mapping[str, T] = field(default_factory=dict)
    """Of the parts of the experts in the last layer, where they differ."""
    splits_latents: bool = False
    """DeepSeek's kv_b as one matrix for keys and one for values."""
    one_by_one: bool = False
    """A tensor per expert, as in 2023."""

    def of_experts(self, part: str, is_last: bool) -> T:
        """Of gate, up or down."""
        found: T = getattr(self, part)
        return self.later.get(part, found) if is_last else found


def encode(values: Array, kind: T) -> tuple[Array, Array]:
    """[.., K] float32 -> (stored array, the values that it stands for)."""
    if kind in HALVES:
        blocks = random_blocks(values.shape, kind, float(np.abs(values).max()))
    else:
        blocks = gguf.quantize(values, kind)
    return blocks, gguf.dequantize(blocks, kind).reshape(values.shape).astype(np.float32)


def random_blocks(shape: tuple[int, ...], kind: T, largest: float) -> Array:
    """Bytes of matrices [.., K] whose values reach about `largest`."""
    columns, size = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(sum(shape))
    blocks = generator.integers(0, 256, (*shape[:-1], shape[-1] // columns, size), dtype=np.uint8)
    for place in HALVES[kind]:
        scales = generator.uniform(0.3, 1.0, blocks.shape[:-1]) * largest / LARGEST[kind]
        blocks[..., place : place + 2] = scales.astype(np.float16)[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def write_pair(
    source: Path, folder: Path, types: Types, split: int = 0, rope_factors: Array | None = None
) -> tuple[Path, Path]:
    """(GGUF file, float twin) of the checkpoint `source`. `split`: tensors of a part; 0: there is one file.

    `rope_factors`: what the file divides the rotary frequencies by; the twin does not.
    """
    folder.mkdir(exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    writer = gguf.GGUFWriter(folder / "tiny.gguf", ARCHITECTURES[model.config.model_type], split_max_tensors=split)
    _write_metadata(writer, model.config, types)
    _write_tokenizer(writer)
    state = {key: tensor.numpy().copy() for key, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    _Tensors(writer, model.config, types).write(state)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.load_state_dict({key: torch.from_numpy(values) for key, values in state.items()}, strict=False)
    model.save_pretrained(folder / "twin")
    tiny_tokenizer().save_pretrained(folder / "twin")
    return next(file for file in sorted(folder.iterdir()) if file.suffix == ".gguf"), folder / "twin"


class _Tensors:
    """Writes tensors, and puts what they stand for back into `state`."""

    def __init__(self, writer: gguf.GGUFWriter, config: Any, types: Types) -> None:
        self._writer, self._config, self._types = writer, config, types
        architecture = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == writer.arch)
        self._names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)

    def write(self, state: dict[str, Array]) -> None:
        for key, values in state.items():
            if ".experts." in key:
                self._experts(key, values)
            else:
                self._dense(key, values)

    def _dense(self, key: str, values: Array) -> None:
        if parts := gguf_hybrids.stored_as(self._writer.arch, key, values, self._config):
            for stored, part in parts:
                self._writer.add_tensor(stored, np.ascontiguousarray(self._permuted(stored, part)))
            return
        known = key.replace("moe_statics.e_score", "e_score").replace("moe.router", "moe.gate")
        name = self._names.get_name(known.replace("_correction_bias", "_correction.bias"), (".weight", ".bias"))
        assert name is not None, key
        name = name if name.endswith((".weight", ".bias")) else f"{name}.weight"
        if self._types.splits_latents and name.endswith("attn_kv_b.weight"):
            self._latents(name, values)
            return
        plain = values.squeeze()
        kind = self._types.dense if plain.ndim == 2 and "ffn_gate_inp" not in name else T.F32
        ordered = self._permuted(name, plain)
        blocks, decoded = encode(ordered, kind)
        self._writer.add_tensor(name, blocks, raw_dtype=kind)
        values[...] = self._permuted(name, decoded, back=True).reshape(values.shape)

    def _permuted(self, name: str, rows: Array, back: bool = False) -> Array:
        match = re.search(r"attn_([qk])\.", name)
        if match is None or self._writer.arch not in PERMUTED:
            return rows
        heads = self._config.num_attention_heads if match[1] == "q" else self._config.num_key_value_heads
        half = len(rows) // heads // 2
        inner = (half, 2) if back else (2, half)
        return np.ascontiguousarray(rows.reshape(heads, *inner, -1).swapaxes(1, 2).reshape(rows.shape))

    def _latents(self, name: str, values: Array) -> None:
        heads, nope = self._config.num_attention_heads, self._config.qk_nope_head_dim
        by_head = values.reshape(heads, -1, values.shape[-1])
        self._writer.add_tensor(name.replace("kv_b", "k_b"), np.ascontiguousarray(by_head[:, :nope].swapaxes(1, 2)))
        self._writer.add_tensor(name.replace("kv_b", "v_b"), np.ascontiguousarray(by_head[:, nope:]))

    def _experts(self, key: str, values: Array) -> None:
        match = re.search(r"layers\.(\d+)\..*experts\.(gate_up|up|down)_proj(_bias)?$", key)
        assert match
        layer, is_bias = int(match[1]), match[3] is not None
        is_gpt_oss = self._config.model_type == "gpt_oss"  # [E, in, out], gate and up alternating
        rows = values.swapaxes(1, 2) if is_gpt_oss and not is_bias else values
        if match[2] != "gate_up":
            self._matrix(layer, match[2], is_bias, rows)
            return
        half = rows.shape[1] // 2
        for i, part in enumerate(("gate", "up")):
            chosen = slice(i, None, 2) if is_gpt_oss else slice(i * half, (i + 1) * half)
            self._matrix(layer, part, is_bias, rows[:, chosen])

    def _matrix(self, layer: int, part: str, is_bias: bool, rows: Array) -> None:
        is_last = layer == self._config.num_hidden_layers - 1
        kind = T.F32 if is_bias else self._types.of_experts(part, is_last)
        blocks, decoded = encode(np.ascontiguousarray(rows), kind)
        rows[...] = decoded
        if self._types.one_by_one:
            for expert, matrix in enumerate(blocks):
                self._writer.add_tensor(f"blk.{layer}.ffn_{part}.{expert}.weight", matrix, raw_dtype=kind)
            return
        name = f"blk.{layer}.ffn_{part}_exps.{'bias' if is_bias else 'weight'}"
        self._writer.add_tensor(name, blocks, raw_dtype=kind)


def _write_metadata(writer: gguf.GGUFWriter, config: Any, types: Types) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", 0))
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1 if types.splits_latents else gguf_hybrids.heads_by_layer(config))
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = getattr(config, "rope_parameters", None) or {"rope_type": "default"}
    if "rope_theta" in rope:
        writer.add_rope_freq_base(rope["rope_theta"])
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if writer.arch != "deepseek2":
        writer.add_key_length(width)
        writer.add_rope_dimension_count(int(width * rope.get("partial_rotary_factor", 1.0)))
    _write_yarn(writer, rope)
    for names, write in _experts_fields(writer).items():
        value = next((found for name in names if (found := getattr(config, name, None)) is not None), None)
        if value is not None:
            write(value)
    if config.model_type in SPECIAL:
        SPECIAL[config.model_type](writer, config, types)


def _experts_fields(writer: gguf.GGUFWriter) -> dict[tuple[str, ...], Callable[[Any], None]]:
    return {
        ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"): writer.add_expert_count,
        ("num_experts_per_tok", "moe_topk", "moe_k"): writer.add_expert_used_count,
        ("n_shared_experts", "moe_num_shared_experts"): writer.add_expert_shared_count,
        ("first_k_dense_replace", "moe_layer_start_index"): writer.add_leading_dense_block_count,
        ("n_group",): writer.add_expert_group_count,
        ("topk_group",): writer.add_expert_group_used_count,
        ("routed_scaling_factor",): writer.add_expert_weights_scale,
        ("norm_topk_prob",): writer.add_expert_weights_norm,
    }


def _write_yarn(writer: gguf.GGUFWriter, rope: dict[str, Any]) -> None:
    if rope["rope_type"] != "yarn":
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    for name in ("beta_fast", "beta_slow"):
        if name in rope:
            getattr(writer, f"add_rope_scaling_yarn_{name}")(rope[name])
    if "mscale_all_dim" in rope:
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])


def _deepseek(writer: gguf.GGUFWriter, config: Any, types: Types) -> None:
    nope, rotary = config.qk_nope_head_dim, config.qk_rope_head_dim
    if config.q_lora_rank is not None:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_rope_dimension_count(rotary)
    writer.add_key_length(config.kv_lora_rank + rotary if types.splits_latents else nope + rotary)
    writer.add_value_length(config.kv_lora_rank if types.splits_latents else config.v_head_dim)
    if types.splits_latents:
        writer.add_key_length_mla(nope + rotary)
        writer.add_value_length_mla(config.v_head_dim)


def _deepseek_v3(writer: gguf.GGUFWriter, config: Any, types: Types) -> None:
    _deepseek(writer, config, types)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


SPECIAL: dict[str, Callable[[gguf.GGUFWriter, Any, Types], None]] = {
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek_v3,
    "granitemoe": gguf_hybrids.granite,
    **gguf_hybrids.METADATA,
    "gpt_oss": lambda writer, config, _: writer.add_sliding_window(config.sliding_window),
}


def _write_tokenizer(writer: gguf.GGUFWriter) -> None:
    vocabulary = tiny_tokenizer().get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(tokens) - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_bos_token_id(len(tokens) - 1)
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for message in messages %}{{ message.content }}{% endfor %}")
