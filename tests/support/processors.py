"""Lesser processors than this one: what holds a whole process back to them, torch, oneDNN and MKL too."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
HELD_BACK: dict[str, Mapping[str, str]] = {
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
"""By kind of processor."""


def run_tests(kind: str, *arguments: str, **more: str) -> str:
    """What pytest prints when it runs tests on such a processor; AssertionError if one fails. `more`: variables."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    environment = os.environ | HELD_BACK[kind] | more
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout
