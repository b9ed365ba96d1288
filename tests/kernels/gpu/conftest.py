"""The same tests twice: on a GPU (marker `gpu`), and without one in Triton's interpreter on CPU tensors.

The interpreter must be chosen before triton is imported, so those run in a process of their own
(tests/kernels/test_gpu_interpreted.py); elsewhere, without a GPU, these files are not collected.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not INTERPRETED:
        for item in items:
            if item.path.is_relative_to(HERE):
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's tiny checkpoint, made once for a module."""
    from ...families.tiny_checkpoints import write_checkpoint
    from ...families.tiny_configs import CASES

    return cache(lambda family: write_checkpoint(CASES[family], tmp_path_factory.mktemp(family)))


@pytest.fixture(autouse=True)
def _products_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own, also where the interpreter stands for a GPU: a CPU's products in one order keep steps of few
    launches away."""
    monkeypatch.setattr("moe_serve.hf.fixed_order.is_available", lambda device, dtype: False)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
