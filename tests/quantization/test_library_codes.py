"""What the package compressed-tensors writes is read as that package reads it, with the config that it writes.

The codes lie in a file, so that the package need not be installed; write_library_codes.py makes it.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from moe_serve.hf.checkpoint import open_all_experts
from moe_serve_kernels.cpu.expert_mlp import as_tensor
from tests.families.quantized_checkpoints import Format, write_pair
from tests.families.tiny_checkpoints import write_checkpoint
from tests.families.tiny_configs import CASES

FILE = Path(__file__).parent / "library_codes.safetensors"
with safe_open(FILE, "pt") as file:
    CONFIGS: dict[str, Any] = json.loads(file.metadata()["configs"])


@cache
def tensors_of(name: str) -> dict[str, torch.Tensor]:
    """By the end of their name; `matrix` is what the package reads back."""
    with safe_open(FILE, "pt") as opened:
        names = [key for key in opened.keys() if key.startswith(f"{name}.")]  # noqa: SIM118  # no mapping
        return {key.removeprefix(f"{name}."): opened.get_tensor(key) for key in names}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose experts have matrices of the file's shape."""
    return write_checkpoint(CASES["mixtral"], tmp_path_factory.mktemp("mixtral"))


@pytest.mark.parametrize("name", CONFIGS)
def test_experts_are_what_the_package_reads(name: str, mixtral: Path, tmp_path: Path) -> None:
    written = dict(tensors_of(name))
    matrix = written.pop("matrix")
    form = Format(CONFIGS[name], lambda _: ({end: each.clone() for end, each in written.items()}, matrix.clone()))
    coded, _ = write_pair(mixtral, tmp_path, form, lambda part: None if "self_attn" in part else form)
    store = open_all_experts(str(coded))
    weights = store.weights(store.layers[0], 5)
    for got in (weights.gate, weights.up, weights.down):
        torch.testing.assert_close(as_tensor(got, torch.float32), matrix, rtol=1e-6, atol=0)
