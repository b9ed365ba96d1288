"""What the doctor says of a checkpoint from its config alone, against what loading it finds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe_serve.doctor.fit import sizes_of

Checkpoint = Callable[[str], Path]


@pytest.mark.parametrize("case", ["deepseek_v2", "deepseek_v3"])
def test_of_deepseek_a_latent_and_a_turned_part_of_the_key_are_cached(case: str, checkpoint: Checkpoint) -> None:
    assert sizes_of(str(checkpoint(case)), torch.float32).kv_bytes_per_token == (24 + 8) * 3 * 4
