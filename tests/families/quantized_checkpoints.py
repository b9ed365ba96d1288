"""Quantised checkpoints of every format, written here from each format's documented layout, and their float twins.

A twin is the same checkpoint with the matrices that the codes stand for, worked out beside the codes and
not from them. Works on safetensors files alone; knows nothing of moe_serve.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from . import four_bit_floats
from .relayout import WEIGHTS, Tensors

GROUP = 32
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
LINEAR = re.compile(r"(experts\.\d+\.\w+|self_attn\.[qkvo]_proj)\.weight$")
"""What a quantiser takes: experts and attention; routers, norms and embeddings stay."""

Quantized = tuple[Tensors, torch.Tensor]
"""Tensors by the end of their name, and the matrix they stand for."""


@dataclass(frozen=True)
class Format:
    """One way to store a matrix [N, K], and what config.json then says."""

    config: dict[str, Any]
    quantize: Callable[[torch.Tensor], Quantized]


def on_grid(w: torch.Tensor, group: int, low: int, high: int, symmetric: bool) -> tuple[torch.Tensor, ...]:
    """Codes, scales and zero points [N, G], and the matrix: codes are round(w / scale) + zero."""
    parts = w.view(w.shape[0], -1, group)
    if symmetric:
        scale = (parts.abs().amax(2) / high).clamp(min=1e-6).to(torch.float16).float()
        zero = torch.zeros_like(scale)
    else:
        least, most = parts.amin(2).clamp(max=0), parts.amax(2).clamp(min=0)
        scale = ((most - least) / (high - low)).clamp(min=1e-6).to(torch.float16).float()
        zero = (low - least / scale).round().clamp(low, high)
    codes = ((parts / scale[:, :, None]).round() + zero[:, :, None]).clamp(low, high)
    matrix = ((codes - zero[:, :, None]) * scale[:, :, None]).view_as(w)
    return codes.view_as(w).long(), scale.to(torch.float16), zero.long(), matrix


def words(codes: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Non-negative codes packed into int32 along `dim`, the first in the low bits; short ends filled with zeros."""
    per_word = 32 // bits
    codes = codes.movedim(dim, 0)
    missing = -codes.shape[0] % per_word
    codes = torch.cat([codes, codes.new_zeros(missing, *codes.shape[1:])])
    packed = sum(codes[i::per_word] << (bits * i) for i in range(per_word))
    assert isinstance(packed, torch.Tensor)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed)
    return packed.to(torch.int32).movedim(0, dim).contiguous()


def ct_packed(bits: int, group: int = 0, symmetric: bool = True) -> Format:
    half = 2 ** (bits - 1)

    def quantize(w: torch.Tensor) -> Quantized:
        codes, scale, zero, matrix = on_grid(w, group or w.shape[1], -half, half - 1, symmetric)
        tensors = {
            "weight_packed": words(codes + half, bits, 1),
            "weight_scale": scale.bfloat16() if symmetric else scale,
            "weight_shape": torch.tensor(w.shape),
        }
        if symmetric:
            scales = scale.bfloat16().float().repeat_interleave(group or w.shape[1], 1)
            return tensors, codes * scales
        return {**tensors, "weight_zero_point": words(zero + half, bits, 0)}, matrix

    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric}
    return Format(compressed("pack-quantized", {**weights, **strategy(group)}), quantize)


def ct_ordered() -> Format:
    """compressed-tensors with an order of columns, as act-order leaves it."""

    def quantize(w: torch.Tensor) -> Quantized:
        order = torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(w.shape[1]))
        codes, scale, _, matrix = on_grid(w[:, order].contiguous(), GROUP, -8, 7, True)
        back = order.argsort()
        return {
            "weight_packed": words(codes[:, back] + 8, 4, 1),
            "weight_scale": scale,
            "weight_shape": torch.tensor(w.shape),
            "weight_g_idx": (back // GROUP).to(torch.int32),
        }, matrix[:, back].contiguous()

    weights = {"num_bits": 4, "type": "int", "symmetric": True, **strategy(GROUP), "actorder": "group"}
    return Format(compressed("pack-quantized", weights), quantize)


def ct_int8() -> Format:
    def quantize(w: torch.Tensor) -> Quantized:
        codes, scale, _, matrix = on_grid(w, w.shape[1], -128, 127, True)
        return {"weight": codes.to(torch.int8), "weight_scale": scale}, matrix

    weights = {"num_bits": 8, "type": "int", "symmetric": True, **strategy(0)}
    return Format(compressed("int-quantized", weights), quantize)


def fp8(scale: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes = (w / scale).to(torch.float8_e4m3fn)
    return codes, codes.float() * scale


def ct_fp8(per_tensor: bool) -> Format:
    def quantize(w: torch.Tensor) -> Quantized:
        scale = w.abs().amax().view(1) / 448 if per_tensor else w.abs().amax(1, keepdim=True) / 448
        codes, matrix = fp8(scale, w)
        return {"weight": codes, "weight_scale": scale}, matrix

    kind = {"strategy": "tensor"} if per_tensor else strategy(0)
    return Format(compressed("float-quantized", {"num_bits": 8, "type": "float", "symmetric": True, **kind}), quantize)


def block_fp8(rows: int, columns: int) -> Format:
    def quantize(w: torch.Tensor) -> Quantized:
        padded = torch.nn.functional.pad(w, (0, -w.shape[1] % columns, 0, -w.shape[0] % rows))
        scale = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).abs().amax((1, 3)) / 448
        wide = scale.repeat_interleave(rows, 0)[: w.shape[0]].repeat_interleave(columns, 1)[:, : w.shape[1]]
        codes, matrix = fp8(wide, w)
        return {"weight": codes, "weight_scale_inv": scale}, matrix

    config = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [rows, columns],
    }
    return Format(config, quantize)


def gptq(symmetric: bool, form: str, bits: int = 4, act_order: bool = False) -> Format:
    top, size = 2**bits - 1, GROUP * bits // 4

    def quantize(w: torch.Tensor) -> Quantized:
        order = torch.arange(w.shape[1])
        if act_order:
            order = torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(1))
        back = order.argsort()
        low = -((top + 1) // 2) if symmetric else 0
        codes, scale, zero, matrix = on_grid(w[:, order].contiguous(), size, low, low + top, symmetric)
        stored_zero = zero - low - (1 if form == "gptq" else 0)
        return {
            "qweight": words((codes - low)[:, back].t(), bits, 0),
            "qzeros": words((stored_zero & top).t(), bits, 1),
            "scales": scale.t().contiguous(),
            "g_idx": (back // size).to(torch.int32),
        }, matrix[:, back].contiguous()

    config = {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": act_order, "sym": symmetric}
    return Format({**config, "checkpoint_format": form}, quantize)


def auto_round(packing: str, packed: Format) -> Format:
    """AutoRound packs as GPTQ and AWQ do, under a config of its own."""
    symmetric = packed.config.get("sym", False)
    config = {"quant_method": "auto-round", "bits": 4, "group_size": GROUP, "sym": symmetric, "data_type": "int"}
    floats = {"model.layers.0.block_sparse_moe.gate": {"bits": 16, "act_bits": 16}}
    return Format({**config, "packing_format": packing, "iters": 200, "extra_config": floats}, packed.quantize)


def awq() -> Format:
    def interleaved(codes: torch.Tensor) -> torch.Tensor:
        """[.., N]: of every eight columns, the one at AWQ_COLUMNS[i] comes i-th."""
        return torch.cat([codes[:, c + i : c + i + 1] for c in range(0, codes.shape[1], 8) for i in AWQ_COLUMNS], 1)

    def quantize(w: torch.Tensor) -> Quantized:
        codes, scale, zero, matrix = on_grid(w, GROUP, 0, 15, False)
        return {
            "qweight": words(interleaved(codes.t()), 4, 1),
            "qzeros": words(interleaved(zero.t()), 4, 1),
            "scales": scale.t().contiguous(),
        }, matrix

    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    return Format(config, quantize)


def nvfp4(producer: str) -> Format:
    """Groups of 16 with e4m3 scales under one float32 factor per matrix, which differs from matrix to matrix."""
    is_modelopt = producer == "modelopt"

    def quantize(w: torch.Tensor) -> Quantized:
        packed, scale, factor, matrix = four_bit_floats.nvfp4(w, divides=not is_modelopt)
        if is_modelopt:
            tensors = {"weight": packed, "weight_scale_2": factor, "input_scale": torch.tensor(0.1)}
            return {**tensors, "weight_scale": scale}, matrix
        return {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": factor.view(1)}, matrix

    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
    if is_modelopt:
        return Format({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}, quantize)
    return Format(compressed("nvfp4-pack-quantized", weights), quantize)


def ct_mxfp4() -> Format:
    def quantize(w: torch.Tensor) -> Quantized:
        blocks, scales, values = four_bit_floats.mxfp4(w)
        return {"weight_packed": blocks.flatten(1), "weight_scale": scales}, values

    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32}
    return Format(compressed("mxfp4-pack-quantized", weights), quantize)


def modelopt_fp8() -> Format:
    def quantize(w: torch.Tensor) -> Quantized:
        scale = w.abs().amax() / 448
        codes, matrix = fp8(scale, w)
        return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.1)}, matrix

    return Format({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}, quantize)


def strategy(group: int) -> dict[str, Any]:
    return {"strategy": "group", "group_size": group} if group else {"strategy": "channel", "group_size": None}


def compressed(layout: str, weights: dict[str, Any]) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


FORMATS: dict[str, Format] = {
    "ct-int4": ct_packed(4, GROUP),
    "ct-int4-zeros": ct_packed(4, GROUP, symmetric=False),
    "ct-int4-ordered": ct_ordered(),
    "ct-int8-packed": ct_packed(8),
    "ct-int8": ct_int8(),
    "ct-fp8": ct_fp8(per_tensor=False),
    "ct-fp8-tensor": ct_fp8(per_tensor=True),
    "fp8-blocks": block_fp8(48, 64),
    "gptq": gptq(True, "gptq"),
    "gptq-zeros": gptq(False, "gptq"),
    "gptq-v2-zeros": gptq(False, "gptq_v2"),
    "gptq-8": gptq(True, "gptq", bits=8),
    "gptq-ordered": gptq(True, "gptq", act_order=True),
    "awq": awq(),
    "auto-round-gptq": auto_round("auto_round:auto_gptq", gptq(False, "gptq")),
    "auto-round": auto_round("auto_round", gptq(False, "gptq_v2")),
    "auto-round-awq": auto_round("auto_round:auto_awq", awq()),
    "ct-nvfp4": nvfp4("compressed-tensors"),
    "ct-mxfp4": ct_mxfp4(),
    "modelopt-nvfp4": nvfp4("modelopt"),
    "modelopt-fp8": modelopt_fp8(),
}


def write_pair(
    source: Path, folder: Path, form: Format, form_of: Callable[[str], Format | None] | None = None
) -> tuple[Path, Path]:
    """(quantised checkpoint, its float twin) of the single-file checkpoint `source`. `form_of`: a matrix's format by
    its name, where that is not always `form`; None: it stays as it is."""
    coded, floats = folder / "quantized", folder / "twin"
    shutil.copytree(source, coded)
    shutil.copytree(source, floats)
    tensors, matrices = {}, {}
    for name, tensor in load_file(source / WEIGHTS).items():
        chosen = form_of(name) if form_of else form
        if not LINEAR.search(name) or chosen is None:
            tensors[name] = matrices[name] = tensor
            continue
        parts, matrices[name] = chosen.quantize(tensor)
        tensors |= {f"{name.removesuffix('weight')}{end}": part for end, part in parts.items()}
    save_file(tensors, coded / WEIGHTS, metadata={"format": "pt"})
    save_file(matrices, floats / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps({**config, "quantization_config": form.config}))
    return coded, floats


def write_mxfp4_pair(source: Path, folder: Path) -> tuple[Path, Path]:
    """The same for GPT-OSS, whose float experts are [E, in, out] and whose quantised ones are [E, out, in]."""
    coded, floats = folder / "quantized", folder / "twin"
    shutil.copytree(source, coded)
    shutil.copytree(source, floats)
    tensors, matrices = {}, {}
    for name, tensor in load_file(source / WEIGHTS).items():
        tensors[name] = matrices[name] = tensor
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, scales, values = four_bit_floats.mxfp4(tensors.pop(name).transpose(1, 2).contiguous())
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            matrices[name] = values.transpose(1, 2).contiguous()
    save_file(tensors, coded / WEIGHTS, metadata={"format": "pt"})
    save_file(matrices, floats / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (coded / "config.json").write_text(json.dumps(config))
    return coded, floats
