"""What the doctor says of a checkpoint from its config alone, against what loading it finds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe_serve.doctor.fit import sizes_of

from .serving import load, runner_of
from .tiny_configs import CASES

Checkpoint = Callable[[str], Path]


@pytest.mark.spanning
@pytest.mark.parametrize("case", CASES)
def test_a_token_takes_as_much_of_the_kv_cache_as_the_doctor_says(case: str, checkpoint: Checkpoint) -> None:
    said = sizes_of(str(checkpoint(case)), torch.float32).kv_bytes_per_token
    llm = load(checkpoint(case))
    num_tokens = (llm.engine.num_pages + 1) * llm.engine.page_size  # one page takes what is padding
    assert said == runner_of(llm).kv_cache.num_bytes / num_tokens


@pytest.mark.parametrize("case", ["mixtral", "qwen3_vl_moe"])
def test_what_is_not_read_takes_no_memory(case: str, checkpoint: Checkpoint) -> None:
    """Experts are counted apart, and the tower of a composite is left in its file."""
    dense = runner_of(load(checkpoint(case))).model.parameters()
    assert sizes_of(str(checkpoint(case)), torch.float32).dense_bytes == sum(p.nbytes for p in dense)
