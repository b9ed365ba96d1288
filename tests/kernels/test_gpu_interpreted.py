"""Runs the GPU kernels' tests in Triton's interpreter, in a process of their own.

Triton decides at import whether kernels are compiled or interpreted, so this process must not import it first.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


pytestmark = [
    pytest.mark.timeout(3600),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed here"),
]


def interpret(marked: str) -> str:
    """What pytest says about the tests with these marks."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marked, "tests/kernels/gpu"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
    return done.stdout


def test_gpu_kernels_in_the_interpreter() -> None:
    assert "1 skipped" in interpret("not slow")  # the one that captures a graph


@pytest.mark.slow
def test_whole_models_in_the_interpreter() -> None:
    assert "skipped" not in interpret("slow")
