"""Write library_codes.safetensors anew: one matrix in every format of the package compressed-tensors, by that package.

Run it where the package is installed: `python tests/quantization/write_library_codes.py`. The file holds, per format,
the tensors that the package writes and the matrix that it reads back; its metadata holds the package's own config.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from compressed_tensors import __version__
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file

FILE = Path(__file__).parent / "library_codes.safetensors"
SIDE = 64
INT4 = {"num_bits": 4, "type": "int"}
INT8 = {"num_bits": 8, "type": "int"}
FP8 = {"num_bits": 8, "type": "float"}
FP4 = {"num_bits": 4, "type": "float"}
E4M3 = torch.float8_e4m3fn
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "int4 in groups": ("pack-quantized", {**INT4, "strategy": "group", "group_size": 32}),
    "int4 with zero points": (
        "pack-quantized",
        {**INT4, "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "int4 a row": ("pack-quantized", {**INT4, "strategy": "channel"}),
    "int8 packed": ("pack-quantized", {**INT8, "strategy": "channel"}),
    "int8 a row": ("int-quantized", {**INT8, "strategy": "channel"}),
    "fp8 a row": ("float-quantized", {**FP8, "strategy": "channel"}),
    "fp8 a matrix": ("float-quantized", {**FP8, "strategy": "tensor"}),
    "fp8 in blocks": ("float-quantized", {**FP8, "strategy": "block", "block_structure": [32, 32]}),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {**FP4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": E4M3},
    ),
    "mxfp4": ("mxfp4-pack-quantized", {**FP4, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}),
    "mxfp8": ("mxfp8-quantized", {**FP8, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}),
}


def coded(form: str, fields: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, Any]]:
    """(what the package writes, what it reads back, its config)."""
    args = QuantizationArgs(**fields)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
    weight = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    state = {"weight": weight}
    if fields["strategy"] == "tensor_group":
        state["weight_global_scale"] = (448 * 6 / weight.abs().max()).reshape(1)
    low, high = extremes(weight, fields)
    scale, zero = calculate_qparams(low, high, args, global_scale=state.get("weight_global_scale"))
    compressor = BaseCompressor.get_value_from_registry(form)
    written = compressor.compress({**state, "weight_scale": scale, "weight_zero_point": zero}, scheme)
    config = QuantizationConfig(config_groups={"group_0": scheme}, format=form, ignore=["lm_head", "re:.*self_attn.*"])
    return written, read_back(written, scheme, compressor), config.model_dump(mode="json")


def read_back(written: dict[str, torch.Tensor], scheme: QuantizationScheme, compressor: Any) -> torch.Tensor:
    """The package's matrix, in float32: it rounds four-bit floats to bfloat16 otherwise."""
    if scheme.format not in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        weight: torch.Tensor = compressor.decompress(written, scheme)["weight"]
        return weight.float()
    values = unpack_fp4_from_uint8(written["weight_packed"], SIDE, SIDE, torch.float32)
    scale = compressor._decompress_scale(written["weight_scale"], torch.float32)
    factor = written.get("weight_global_scale")
    shared = {"args": scheme.weights, "global_scale": factor, "dtype": torch.float32}
    matrix: torch.Tensor = dequantize(x_q=values, scale=scale, **shared)
    return matrix


def extremes(weight: torch.Tensor, fields: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of what shares a scale."""
    if fields["strategy"] == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if fields["strategy"] == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if fields["strategy"] == "block":
        rows, columns = fields["block_structure"]
        blocks = weight.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    groups = weight.unflatten(1, (-1, fields["group_size"]))
    return groups.amin(2), groups.amax(2)


if __name__ == "__main__":
    tensors: dict[str, torch.Tensor] = {}
    configs: dict[str, Any] = {}
    for name, (form, fields) in FORMATS.items():
        written, matrix, configs[name] = coded(form, fields)
        tensors |= {f"{name}.{end}": tensor.contiguous() for end, tensor in written.items()}
        tensors[f"{name}.matrix"] = matrix
    save_file(tensors, FILE, metadata={"configs": json.dumps(configs), "version": __version__})
