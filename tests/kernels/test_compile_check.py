"""Kernels compiled for GPUs that are not here: a part of them here, all of them by benchmarks/gpu.sh."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed here")
ROOT = Path(__file__).parents[2]
QUICK = "^(combine|copy|gate_up_kernel plain 16x.*silu|down_kernel plain 16x)"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


def compile_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, compiled and not interpreted, whatever this one's environment says."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.compile_check", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("arch", "part"),
    [pytest.param(arch, "", id=arch, marks=pytest.mark.slow) for arch in ARCHITECTURES]
    + [pytest.param("sm_120", QUICK, id="sm_120, quick")],
)
def test_kernels_compile_without_faults(arch: str, part: str) -> None:
    done = compile_check("--arch", arch, "--only", part)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 with faults" in done.stdout
    matrix = "wgmma" if arch == "sm_90" else "mma"
    shipped = [line.split() for line in done.stdout.splitlines() if " down_kernel plain" in line]
    assert matrix in next(line for line in shipped if "resort" not in line)


def test_nothing_compiled_is_a_failure() -> None:
    assert compile_check("--only", "no such kernel").returncode == 1


@pytest.mark.slow
def test_faults_are_found() -> None:
    """Two accumulators of 128 x 256 fit neither the registers nor the shared memory."""
    code = (
        "import sys; from tests.support import compile_check; from moe_serve_kernels.gpu import configs;"
        "tile = configs.Tile(128, 256, 64, 8, 4, False);"
        "configs.HOPPER_STEPS['plain'].clear(); configs.HOPPER_STEPS['plain'][128] = configs.GroupedConfig(tile, tile);"
        "sys.exit(compile_check.main(['--arch', 'sm_90', '--only', '^gate_up_kernel plain.*silu']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAULT: spills" in done.stdout
    assert "shared memory beyond" in done.stdout


def test_the_matrix_instruction_is_checked() -> None:
    code = (
        "from tests.support.compile_check import _faults;"
        "assert list(_faults(90, 0, 0, 'mma', 'wgmma')) == ['wgmma expected'];"
        "assert list(_faults(80, 0, 170 << 10, '-', '-')) == ['shared memory beyond 166912']"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
