"""The tables of docs/models.md are what their script writes today."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_serve.hf.families import family_in
from tests.support.scripts import docs_script

from .rows import ROWS

SCRIPT = docs_script("write_models")
PAGE = (Path(__file__).parents[2] / "docs/models.md").read_text()
ANEW = "run: python docs/write_models.py"
SMALL = "allenai/OLMoE-1B-7B-0924"


def test_the_table_of_checkpoints_is_of_today() -> None:
    assert SCRIPT.renewed(PAGE, "checkpoints") == PAGE, ANEW
    assert len({row.name for row in ROWS}) == 25


def test_no_row_without_a_twin_is_of_a_served_family() -> None:
    """Unless it says which of its codes are not read."""
    served = [row for row in ROWS if row.twin is None and family_in({"model_type": row.model_type})]
    assert [row.name for row in served if not row.lacks] == []


def test_a_line_of_sizes_is_of_today() -> None:
    assert f"{SCRIPT.fit_line(SMALL)}\n" in PAGE, ANEW


@pytest.mark.slow
def test_the_table_of_sizes_is_of_today() -> None:
    assert SCRIPT.renewed(PAGE, "sizes") == PAGE, ANEW
