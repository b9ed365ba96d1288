"""Session-wide tiny checkpoints and their references: each is made once, when first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from .references import Reference, compute_reference
from .tiny_checkpoints import write_checkpoint
from .tiny_configs import CASES


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny matrices run faster on one thread than on two that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """case name -> checkpoint folder."""
    return cache(lambda case: write_checkpoint(CASES[case], tmp_path_factory.mktemp(case)))


@pytest.fixture(scope="session")
def reference(checkpoint: Callable[[str], Path]) -> Callable[[str], Reference]:
    """case name -> what transformers generates from that checkpoint."""
    return cache(lambda case: compute_reference(checkpoint(case)))
