"""Writing a twin: the checkpoint in its published form, and the float checkpoint that has its answers.

Works on safetensors and JSON files; knows nothing of moe_serve.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.families.quantized_checkpoints import write_mxfp4_pair, write_pair
from tests.families.relayout import WEIGHTS, Tensors, split_experts
from tests.families.tiny_checkpoints import write_checkpoint
from tests.families.tiny_configs import CASES

from .twin import Composite, Twin

OUR_KEYS = ("dtype", "rope_parameters", "transformers_version", "architectures")
"""What transformers 5 writes, and older configs do not have."""
LAST = 2
"""Number of the tiny models' last layer."""
HIDDEN = 64


def publish(twin: Twin, folder: Path) -> tuple[Path, Path]:
    """(the checkpoint as published, the float checkpoint with its answers)."""
    source = write_checkpoint(CASES[twin.case], folder / "source")
    edit(source, twin.fields, (*OUR_KEYS, *twin.dropped))
    if twin.fields.get("tie_word_embeddings"):
        _change(source, lambda tensors: {name: t for name, t in tensors.items() if name != "lm_head.weight"})
    if twin.splits:
        _change(source, split_experts)
    coded, floats = _pair(twin, source, folder / "pair")
    if twin.quantization:
        stated = json.loads((coded / "config.json").read_text())["quantization_config"]
        edit(coded, {"quantization_config": {**stated, **twin.quantization}})
    if twin.reference_type is not None:
        edit(floats, {"model_type": twin.reference_type})
    if twin.behind:
        _change(coded, lambda tensors: tensors | _behind(tensors, twin.behind))
    if twin.composite is not None:
        _wrap(coded, twin.composite)
    if twin.further:
        _change(coded, lambda tensors: tensors | _further(tensors, twin.further))
    _add_files(coded, twin)
    return coded, floats


def _pair(twin: Twin, source: Path, folder: Path) -> tuple[Path, Path]:
    folder.mkdir()
    if twin.is_mxfp4:
        return write_mxfp4_pair(source, folder)
    if (form := twin.form) is not None:
        return write_pair(source, folder, form, lambda name: form if twin.coded(name) else None)
    floats = folder / "twin"
    floats.mkdir()
    for file in source.iterdir():
        (floats / file.name).write_bytes(file.read_bytes())
    return source, floats


def edit(folder: Path, fields: Mapping[str, Any], dropped: tuple[str, ...] = ()) -> None:
    """Change config.json: `dropped` goes, then `fields` come."""
    config = json.loads((folder / "config.json").read_text())
    kept = {name: value for name, value in config.items() if name not in dropped}
    (folder / "config.json").write_text(json.dumps({**kept, **fields}))


def _change(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def _behind(tensors: Tensors, names: tuple[str, ...]) -> Tensors:
    """A layer for predicting several tokens at once, numbered behind the model's last one."""
    own, next_ = f".layers.{LAST}.", f".layers.{LAST + 1}."
    copied = {name.replace(own, next_): tensor.clone() for name, tensor in tensors.items() if own in name}
    return copied | {f"model.layers.{LAST + 1}.{name}": torch.ones(HIDDEN, HIDDEN) for name in names}


def _further(tensors: Tensors, names: tuple[str, ...]) -> Tensors:
    """The same in a model of its own, whose layers count from 0."""
    own = f"layers.{LAST}."
    copied = {f"mtp.layers.0.{n.split(own)[1]}": t.clone() for n, t in tensors.items() if own in n}
    return copied | {f"mtp.{name}": torch.ones(HIDDEN, HIDDEN) for name in names}


def _wrap(folder: Path, composite: Composite) -> None:
    """Text model under a prefix, its config under text_config, and a tower beside it."""
    config = json.loads((folder / "config.json").read_text())
    outside = ("quantization_config",) if not composite.codes_inside else ()
    outer = {name: config.pop(name) for name in outside if name in config}
    text_type = composite.text_type or config["model_type"]
    (folder / "config.json").write_text(
        json.dumps({**outer, **composite.fields, "text_config": {**config, "model_type": text_type}})
    )
    tower = {f"{composite.tower}blocks.0.attn.proj.weight": torch.ones(8, 8)}
    _change(folder, lambda tensors: {_inside(composite.prefix, name): t for name, t in tensors.items()} | tower)


def _inside(prefix: str, name: str) -> str:
    if prefix == "language_model.":  # around the whole text model
        return prefix + name
    return prefix + name.removeprefix("model.") if name.startswith("model.") else name


def _add_files(folder: Path, twin: Twin) -> None:
    defaults = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "bos_token_id": 1}
    ends = list(twin.end_tokens)
    (folder / "generation_config.json").write_text(json.dumps({**defaults, "eos_token_id": ends}))
    (folder / "chat_template.jinja").write_text(twin.template)
