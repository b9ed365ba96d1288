"""Batch invariance on lesser processors than this one: the whole process is held back to them, torch and oneDNN too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_serve_kernels.cpu import library

pytestmark = pytest.mark.skipif(library.load() is None, reason="C++ kernels are not built here (no compiler)")

HELD_BACK = {
    "avx512 without bf16": {
        "MOE_SERVE_MAX_CPU_ISA": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
    "avx2": {
        "MOE_SERVE_MAX_CPU_ISA": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "generic": {
        "MOE_SERVE_MAX_CPU_ISA": "generic",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
}
"""What each kind of processor lets our kernels, oneDNN, torch and MKL use."""


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
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["tests/families/test_batch_invariance.py", "-k", family]
    environment = os.environ | HELD_BACK[kind] | {"MOE_SERVE_TEST_REQUESTS": "12"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "16 passed" in done.stdout
