"""The kernels compiled for lesser processors than this one: the same tests, in a process that is held back to them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_serve_kernels.cpu import library

pytestmark = pytest.mark.skipif(library.load() is None, reason="C++ kernels are not built here (no compiler)")
NAMES = ("coded", "decode_step", "expert_layer", "expert_mlp", "linear", "paged_attention", "quantized_mlp", "row_bits")


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx512", "avx2", "generic"])
def test_all_kernels(isa: str) -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    files = [str(here / f"test_{name}.py") for name in NAMES]
    environment = os.environ | {"MOE_SERVE_MAX_CPU_ISA": isa}
    done = subprocess.run([*command, *files], env=environment, capture_output=True, text=True, cwd=here.parents[1])
    assert done.returncode == 0, done.stdout[-3000:]
