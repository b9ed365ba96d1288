"""Writing a checkpoint whose experts, and dense weights if asked, are quantised, in compressed-tensors' pack-quantized
format.

Shard by shard, so that memory holds one shard. Everything else is copied as it is.
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
from moe_serve.quantization.dense_choice import EXPERTS, OTHERS, DenseChoice, Precision
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
    dense: Precision | None = None,
) -> int:
    """Quantise the experts of the checkpoint in `source` into the folder `target`; with `dense` its other linear layers
    too.

    Returns the bytes of the tensors written.
    `group` 0: one scale per row. `target` is made where it is missing. ConfigError or UnsupportedModelError.
    """
    config = read_config(source)
    family = family_of(config)
    _check(source, config, family, group)
    target.mkdir(exist_ok=True)
    index: dict[str, str] = {}
    ignored: list[str] = []
    total_bytes = 0
    quantizer = _Quantizer(Precision(bits, group), importance, DenseChoice(config, family, dense), on_matrix)
    for file in safetensors_files(source):
        tensors, kept = quantizer.shard(file)
        _save(tensors, target / file.name)
        ignored += kept
        index |= dict.fromkeys(tensors, file.name)
        total_bytes += sum(t.nbytes for t in tensors.values())
    _write_rest(Path(source), target, quantization_config(bits, group, ignored, dense))
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


def num_matrices(source: str, dense: Precision | None = None) -> int:
    """Matrices that `write_quantized` would quantise."""
    count, config = 0, read_config(source)
    choice = DenseChoice(config, family_of(config), dense)
    for file in safetensors_files(source):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - safe_open is not a dict
                is_expert = _expert_of(name, config.num_hidden_layers) is not None
                count += is_expert or choice.of(name, tuple(handle.get_slice(name).get_shape())) is not None
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


class _Quantizer:
    """Turns a shard's tensors into those of the quantised checkpoint."""

    def __init__(
        self,
        experts: Precision,
        importance: Importance | None,
        dense: DenseChoice,
        on_matrix: Callable[[], object],
    ) -> None:
        self._experts, self._importance, self._dense, self._on_matrix = experts, importance, dense, on_matrix

    def shard(self, file: Path) -> tuple[Tensors, list[str]]:
        """The shard's tensors, and the names of linear layers left as they were."""
        tensors: Tensors = {}
        left: list[str] = []
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - safe_open is not a dict
                tensor = handle.get_tensor(name)
                rounded = self._rounded(name, tensor)
                if rounded is not None:
                    prefix = name.removesuffix("weight")
                    tensors |= {prefix + end: part for end, part in rounded.items()}
                    self._on_matrix()
                    continue
                tensors[name] = tensor
                if tensor.ndim == 2 and name.endswith(".weight") and "embed" not in name:
                    left.append(name.removesuffix(".weight"))
        return tensors, left

    def _rounded(self, name: str, tensor: torch.Tensor) -> Tensors | None:
        """What is written of a matrix that is quantised; None for another tensor."""
        match = _expert_of(name, self._dense.num_layers)
        if match is None:
            precision = self._dense.of(name, tuple(tensor.shape))
            return None if precision is None else packed(round_matrix(tensor, *precision), precision.bits)
        weights = None
        if self._importance is not None:
            weights = self._importance(int(match["layer"]), int(match["expert"]))[PART_OF[match["part"]] == "down"]
        return packed(round_matrix(tensor, *self._experts, weights), self._experts.bits)


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


def quantization_config(bits: int, group: int, ignore: list[str], dense: Precision | None = None) -> dict[str, Any]:
    """What config.json says about such a checkpoint."""
    groups = {"group_0": _group(["Linear"], Precision(bits, group))}
    if dense not in (None, Precision(bits, group)):
        groups = {"group_0": _group([EXPERTS], Precision(bits, group)), "group_1": _group([OTHERS], dense)}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(ignore),
        "kv_cache_scheme": None,
    }


def _group(targets: list[str], precision: Precision) -> dict[str, Any]:
    weights = {
        "num_bits": precision.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if precision.group else "channel",
        "group_size": precision.group or None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
    }
    return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}


def _write_rest(source: Path, target: Path, fields: dict[str, Any]) -> None:
    """config.json with `quantization_config`, and every other file that is no weights."""
    for file in source.iterdir():
        weights = file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf")
        if file.is_file() and not weights and file.name not in ("config.json", INDEX):
            shutil.copy2(file, target / file.name)
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": fields}, indent=2) + "\n")
