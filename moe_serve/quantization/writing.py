"""Writing a checkpoint whose experts are quantised, in compressed-tensors' pack-quantized format.

Shard by shard, so that memory holds one shard. Everything that is not an expert's matrix is copied as it is.
The layout is the one that compressed-tensors documents and that vLLM and SGLang read as well.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moe_serve.errors import ConfigError, UnsupportedModelError
from moe_serve.hf.checkpoint import safetensors_files
from moe_serve.hf.config_file import read_config
from moe_serve.hf.family import FURTHER, PART_OF, PER_EXPERT, Family, family_of
from moe_serve.hf.shard_index import INDEX
from moe_serve.quantization.rounding import Rounded, round_matrix

Importance = Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]
"""(layer, expert) -> mean squares of what gate and up read, and of what down reads."""
Tensors = dict[str, torch.Tensor]


def write_quantized(
    source: str,
    target: Path,
    bits: int,
    group: int,
    importance: Importance | None,
    on_matrix: Callable[[], object] = lambda: None,
) -> int:
    """Quantise the experts of the checkpoint in `source` into the folder `target`.

    Returns the bytes of the tensors written.
    `group` 0: one scale per row. `target` is made where it is missing. ConfigError or UnsupportedModelError.
    """
    config = read_config(source)
    _check(source, config, family_of(config), group)
    target.mkdir(exist_ok=True)
    index: dict[str, str] = {}
    dense: list[str] = []
    total_bytes = 0
    for file in safetensors_files(source):
        tensors, kept = _quantized_shard(file, config.num_hidden_layers, bits, group, importance, on_matrix)
        _save(tensors, target / file.name)
        dense += kept
        index |= dict.fromkeys(tensors, file.name)
        total_bytes += sum(t.nbytes for t in tensors.values())
    _write_rest(Path(source), target, quantization_config(bits, group, dense))
    if (Path(source) / INDEX).is_file():
        metadata = {"total_size": total_bytes}
        (target / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": index}, indent=2))
    return total_bytes


def _save(tensors: Tensors, file: Path) -> None:
    """OSError where it cannot be written: safetensors has an error of its own for a full disk."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error


def num_matrices(source: str) -> int:
    """Expert matrices that `write_quantized` would quantise."""
    count, layers = 0, read_config(source).num_hidden_layers
    for file in safetensors_files(source):
        with safe_open(file, framework="pt") as handle:
            count += sum(_expert_of(name, layers) is not None for name in handle.keys())  # noqa: SIM118
    return count


def _expert_of(name: str, num_layers: int) -> re.Match[str] | None:
    """The match of an expert's matrix. Layers behind the model's own predict several tokens and stay as they are."""
    match = PER_EXPERT.search(name)
    is_further = FURTHER.search(name) is not None or (match is not None and int(match["layer"]) >= num_layers)
    return None if is_further else match


def _check(source: str, config: Any, family: Family, group: int) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(f"{source} is quantised already; give the checkpoint it was made from")
    fused = False
    for file in safetensors_files(source):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - safe_open is not a dict
                if _expert_of(name, config.num_hidden_layers) is None:
                    fused |= PER_EXPERT.search(name) is None and family.match(name) is not None
                    continue
                columns = handle.get_slice(name).get_shape()[1]
                if group and columns % group:
                    raise ConfigError(f"--group-size {group} does not divide the {columns} columns of {name}")
    if fused:
        raise UnsupportedModelError(
            f"{source}: experts are stored in one tensor per layer; save the model with one tensor per expert"
            " (experts.N.gate_proj.weight and so on), which is what compressed-tensors describes"
        )


def _quantized_shard(
    file: Path, num_layers: int, bits: int, group: int, importance: Importance | None, on_matrix: Callable[[], object]
) -> tuple[Tensors, list[str]]:
    """The shard's tensors, and the names of linear layers left as they were."""
    tensors: Tensors = {}
    dense: list[str] = []
    with safe_open(file, framework="pt") as handle:
        for name in handle.keys():  # noqa: SIM118 - safe_open is not a dict
            tensor = handle.get_tensor(name)
            match = _expert_of(name, num_layers)
            if match is None:
                tensors[name] = tensor
                if tensor.ndim == 2 and name.endswith(".weight") and "embed" not in name:
                    dense.append(name.removesuffix(".weight"))
                continue
            weights = None
            if importance is not None:
                is_down = PART_OF[match["part"]] == "down"
                weights = importance(int(match["layer"]), int(match["expert"]))[is_down]
            rounded = round_matrix(tensor, bits, group, weights)
            prefix = name.removesuffix("weight")
            tensors |= {prefix + end: part for end, part in packed(rounded, bits).items()}
            on_matrix()
    return tensors, dense


def packed(rounded: Rounded, bits: int) -> Tensors:
    """The tensors of a matrix in pack-quantized format, by the end of their name.

    weight_packed [N, K * bits / 32] int32: codes raised to be positive, the first column in the low bits.
    """
    rows, columns = rounded.codes.shape
    per_word = 32 // bits
    codes = (rounded.codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, -columns % per_word))
    if bits == 4:
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    return {
        "weight_packed": codes.contiguous().view(torch.int32),
        "weight_scale": rounded.scales,
        "weight_shape": torch.tensor([rows, columns]),
    }


def quantization_config(bits: int, group: int, ignore: list[str]) -> dict[str, Any]:
    """What config.json says about such a checkpoint."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if group else "channel",
        "group_size": group or None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
    }
    linear = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": linear},
        "ignore": sorted(ignore),
        "kv_cache_scheme": None,
    }


def _write_rest(source: Path, target: Path, fields: dict[str, Any]) -> None:
    """config.json with `quantization_config`, and every other file that is no weights."""
    for file in source.iterdir():
        weights = file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf")
        if file.is_file() and not weights and file.name not in ("config.json", INDEX):
            shutil.copy2(file, target / file.name)
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": fields}, indent=2) + "\n")
