"""The engine's tests on lesser processors than this one: the whole process is held back to them."""

from __future__ import annotations

import pytest

from moe_serve_kernels.cpu import library
from tests.support.processors import HELD_BACK, run_tests

pytestmark = pytest.mark.skipif(library.load() is None, reason="C++ kernels are not built here (no compiler)")
FILES = ("engine", "prompt_logprobs", "prompt_scoring", "forward_batch", "sampler", "decode_graphs")
"""Those that compute; scheduling is the same on every processor."""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", HELD_BACK)
def test_the_engine(kind: str) -> None:
    said = run_tests(kind, *(f"tests/engine/test_{name}.py" for name in FILES), "-m", "not slow")
    assert " passed" in said
