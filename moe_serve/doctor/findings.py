"""What this machine has, and what is missing that would make serving faster or possible at all."""

from __future__ import annotations

import importlib.util
import os
import platform
import resource
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_serve.memory import free_bytes
from moe_serve.resolve import has_native_bf16
from moe_serve_kernels.cpu import library

FEW_FILES = 4096


@dataclass(frozen=True, slots=True)
class Hardware:
    """The machine, as this process may use it."""

    cpu: str
    num_cores: int
    native_bf16: bool
    free_memory_bytes: int
    """Within the container's limit."""
    gpus: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be, and what to do about it."""

    what: str
    fix: str
    is_error: bool = False
    """Serving would fail, rather than be slower."""


def hardware() -> Hardware:
    return Hardware(
        cpu=_cpu_name(),
        num_cores=len(os.sched_getaffinity(0)),
        native_bf16=has_native_bf16(),
        free_memory_bytes=free_bytes(torch.device("cpu")),
        gpus=tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())),
    )


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def findings() -> list[Finding]:
    """Empty on a machine that lacks nothing."""
    return [*_compiled(), *_cuda(), *_limits()]


def _compiled() -> Iterator[Finding]:
    if library.load() is None:
        compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        fix = "reinstall moe-serve" if compiler else "install a C++ compiler (g++), then reinstall moe-serve"
        yield Finding("our C++ kernels are not built: decoding on the CPU is several times slower", fix)


def _cuda() -> Iterator[Finding]:
    if torch.cuda.is_available():
        if importlib.util.find_spec("triton") is None:
            yield Finding(
                "triton is not installed: GPU kernels fall back to torch", "pip install 'moe-serve-engine[gpu]'"
            )
    elif Path("/dev/nvidia0").exists() or Path("/proc/driver/nvidia/version").exists():
        build = torch.version.cuda or "no CUDA"
        yield Finding(f"there is an NVIDIA GPU, but torch (built for {build}) cannot use it", "install torch for CUDA")


def _limits() -> Iterator[Finding]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < FEW_FILES:
        yield Finding(f"at most {hard} open files, so about as many connections", f"ulimit -n {FEW_FILES * 16}")
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if huge.exists() and "[never]" in huge.read_text(encoding="utf-8"):
        yield Finding("transparent huge pages are off: more TLB misses while decoding", f"echo madvise > {huge}")
    if os.environ.get("OMP_WAIT_POLICY", "").lower() == "active":
        yield Finding("OMP_WAIT_POLICY=active: idle threads spin and take cores from HTTP", "unset OMP_WAIT_POLICY")
