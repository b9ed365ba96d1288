"""Every tensor of a checkpoint is used, known to be unneeded, or an error that names it.

transformers ignores what its model has no place for, with a note in a table on stderr. Scales whose note was lost, or
biases that another tool added, would be ignored too, and the answers would be wrong. Knows names and dtypes; reads a
tensor's values only where all zeros would make it unneeded.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from moe_serve.errors import CheckpointError
from moe_serve.hf.family import FURTHER

UNNEEDED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|masked_bias|(k|v|kv|q|prob|input|output)_scale|(k|v)_zero_point)$")
"""Tables that are computed, and scales of activations and caches that stay floats here."""
FURTHER_COUNTS = ("num_nextn_predict_layers", "num_mtp_modules", "mtp_num_hidden_layers", "mtp_num_layers")
"""Fields of config.json: how many further layers lie behind the model's own."""
FURTHER_PARTS = re.compile(r"\.(enorm|hnorm|eh_proj|shared_head)\.")
"""Tensors that only such a layer has (DeepSeek-V3, GLM-4.5)."""
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
FLOATS = {"F64", "F32", "BF16", "F16"}
NO_NOTE = (
    "; neither quantization_config in config.json nor hf_quant_config.json says how to read it. Take that note from"
    " where the checkpoint came from"
)
MOST_NAMES = 5


def refuse_gaps(folder: str, info: Any) -> None:
    """transformers fills gaps with random numbers and a warning; here they are errors."""
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:5])
        raise CheckpointError(f"{folder}: {len(info['missing_keys'])} tensors are missing, among them {names}")
    for name, found, wanted in sorted(info["mismatched_keys"], key=str):
        raise CheckpointError(f"{folder}: {name} has shape {tuple(found)}, but config.json asks for {tuple(wanted)}")


def refuse_leftovers(folder: str, files: Iterable[Path], names: Collection[str], hf_config: Any) -> None:
    """`names`: what the model has no place for. CheckpointError names those that would have changed its answers.

    Layers behind the model's own are unneeded where config.json or their tensors say what they are for.
    """
    further = _further_layers(names, hf_config)
    rest = {name for name in names if not is_further(name, further) and not UNNEEDED.search(name)}
    rest -= set(_all_zero(files, {name for name in rest if name.endswith(".bias")}))
    if rest:
        listed = ", ".join(sorted(rest)[:MOST_NAMES]) + (", ..." if len(rest) > MOST_NAMES else "")
        hint = NO_NOTE if any("scale" in name or "qweight" in name or "qzeros" in name for name in rest) else ""
        raise CheckpointError(f"{folder}: {len(rest)} tensors have no place in the model: {listed}{hint}")


def refuse_codes(file: Path, dtypes: Iterable[tuple[str, str]]) -> None:
    """(name, dtype) of tensors that are to be read as they are. CheckpointError names one that is no float."""
    for name, dtype in dtypes:
        if dtype not in FLOATS and name.endswith((".weight", "_proj")):
            raise CheckpointError(f"{file}: {name} is stored as {dtype}{NO_NOTE}")


def refuse_unused_experts(folder: str, layer: int, experts: Iterable[int | None], num_experts: int) -> None:
    """CheckpointError where a layer of the files has more experts than the model."""
    most = max((expert for expert in experts if expert is not None), default=0)
    if most >= num_experts:
        raise CheckpointError(
            f"{folder}: layer {layer} has an expert {most}, but config.json names {num_experts} experts"
        )


def _further_layers(names: Iterable[str], hf_config: Any) -> set[int]:
    """Numbers of the layers that predict several tokens at once, counted on from the model's own. Only layers that the
    names have: a count in config.json may be any number."""
    own = hf_config.num_hidden_layers
    counts = (getattr(hf_config, field, 0) for field in FURTHER_COUNTS)
    named = range(own, own + max(count for count in (0, *counts) if isinstance(count, int)))
    marked = {layer_of(name, -1) for name in names if FURTHER_PARTS.search(name)}
    found = {layer_of(name, -1) for name in names}
    return {layer for layer in found if layer in named or (layer in marked and layer >= own)}


def layer_of(name: str, otherwise: int) -> int:
    """The layer in a tensor's name; `otherwise` for a tensor of none."""
    layer = LAYER.search(name)
    return otherwise if layer is None else int(layer[1])


def is_further(name: str, layers: Container[int]) -> bool:
    """A tensor of a layer that predicts several tokens at once. `layers`: numbers of such layers."""
    return bool(FURTHER.search(name)) or layer_of(name, -1) in layers


def _all_zero(files: Iterable[Path], names: set[str]) -> Iterator[str]:
    """Those that add nothing: GPTQ tools write a bias for every matrix, of zeros where there was none.

    `names` are transformers', which calls Mixtral's block_sparse_moe mlp.
    """
    for file in files if names else ():
        with safe_open(file, framework="pt") as handle:
            for stored in handle.keys():  # noqa: SIM118 - safe_open is not a dict
                name = stored.replace(".block_sparse_moe.", ".mlp.")
                if name in names and not handle.get_tensor(stored).any():
                    yield name
