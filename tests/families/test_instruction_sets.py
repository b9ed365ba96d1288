"""Batch invariance on lesser processors than this one: the whole process is held back to them, torch and oneDNN too."""

from __future__ import annotations

import pytest

from moe_serve_kernels.cpu import library
from tests.support.processors import HELD_BACK, run_tests

pytestmark = pytest.mark.skipif(library.load() is None, reason="C++ kernels are not built here (no compiler)")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("kind", "family"),
    [
        pytest.param(kind, family, marks=() if (kind, family) == ("avx2", "gpt_oss") else pytest.mark.slow)
        for kind in HELD_BACK
        for family in ("deepseek_v2", "gpt_oss")
    ],
)
def test_batch_invariance(kind: str, family: str) -> None:
    said = run_tests(
        kind,
        "tests/families/test_batch_invariance.py",
        "-k",
        f"{family} and not every_family",
        MOE_SERVE_TEST_REQUESTS="12",
    )
    assert "16 passed" in said
