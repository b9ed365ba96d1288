"""Compiles every kernel in every configuration for GPUs that are not here, and reads what the compiler made of it.

    python -m tests.support.compile_check [--arch sm_90 sm_120] [--only REGEX]

Prints one line per kernel: registers, spilled instructions, shared memory and kind of matrix instruction, as cuobjdump
(bundled with triton) finds them in the machine code. Exits with 1 if one spills, needs more shared memory than a block
can have, lacks the large matrix instruction of its GPU where it should have it, or waits for each load of a loop. Such
faults would otherwise show as a launch error or an unexplained slowness on the first GPU.

What is compiled is what the launchers launch: they are called on tensors without memory, and the call is caught.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from moe_serve_kernels.gpu import gpu_model
from moe_serve_kernels.gpu.gpu_model import SHARED_BYTES
from tests.support.launches import MMA, Launch, launches

WGMMA_ARCH = 90
"""The one architecture with wgmma; Blackwell's tcgen05 is for later, its mma code runs."""
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
TYPE_OF = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}
PIPELINED = "gemv_"
"""Kernels of this name have loops without a matrix product, which are pipelined only if they say so."""
ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True, slots=True)
class Caught:
    """One kernel launch that was caught before it happened."""

    function: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Compiled:
    """What one kernel became."""

    name: str
    arch: int
    registers: int
    spills: int
    """Instructions that read or write local memory, and bytes of stack."""
    shared_bytes: int
    mma: str
    """wgmma, mma or -."""
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        line = f"sm_{self.arch} {self.name:<58} {self.registers:>4} regs {self.spills:>4} spills"
        line += f" {self.shared_bytes:>7} B shared  {self.mma:<5}"
        return line + "".join(f"  FAULT: {fault}" for fault in self.faults)


def caught(call: Callable[[], object]) -> list[Caught]:
    """The kernels that `call` would launch."""
    found: list[Caught] = []

    def record(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        arguments = dict(zip(function.arg_names, args, strict=False)) | kwargs
        found.append(Caught(function, arguments, options))

    with mock.patch.object(JITFunction, "run", record):
        call()
    return found


def compile_launch(launch: Caught, arch: int) -> Any:
    """The kernel compiled for a compute capability, as triton's JIT would specialise it for these arguments."""
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for index, parameter in enumerate(launch.function.params):
        value = launch.arguments[parameter.name]
        kind = "constexpr" if parameter.is_constexpr else _kind(value)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(index,)] = ALIGNED
    source = ASTSource(launch.function, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + TYPE_OF[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if value == 1:
        return "constexpr"
    return "i32" if abs(value) < 1 << 31 else "i64"


def inspect(name: str, expected_mma: str, compiled: Any, arch: int) -> Compiled:
    """Read the machine code and say what is wrong with it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        code = _cuobjdump("--dump-sass", file.name)
    local = len(re.findall(r"\b(?:LDL|STL)\b", code)) + int(_number(r"STACK:(\d+)", usage))
    mma = "wgmma" if "HGMMA" in code else "mma" if "HMMA" in code else "-"
    shared = int(compiled.metadata.shared)
    faults = list(_faults(arch, local, shared, mma, expected_mma))
    if name.startswith(PIPELINED) and "cp.async" not in compiled.asm["ptx"]:
        faults.append("no load is ahead of its use")
    return Compiled(name, arch, int(_number(r"REG:(\d+)", usage)), local, shared, mma, faults)


def _faults(arch: int, spills: int, shared_bytes: int, mma: str, expected_mma: str) -> Iterator[str]:
    if spills:
        yield "spills"
    if shared_bytes > SHARED_BYTES[arch]:
        yield f"shared memory beyond {SHARED_BYTES[arch]}"
    if mma != expected_mma:
        yield f"{expected_mma} expected"


def _number(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found, f"cuobjdump printed no {pattern}"
    return found[1]


def _cuobjdump(option: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def check(arches: list[int], only: str = "") -> Iterator[Compiled]:
    """Compile everything whose name matches `only`, one after the other."""
    for arch in arches:
        for launch in launches(gpu_model.known(arch)):
            for call in caught(launch.call):
                kernel = call.function.__name__
                name = f"{kernel} {launch.name}".strip()
                if re.search(only, name):
                    yield inspect(name, _expected_mma(launch, kernel, arch), compile_launch(call, arch), arch)


def _expected_mma(launch: Launch, kernel: str, arch: int) -> str:
    if kernel not in launch.mma:
        return "-"
    return launch.mma[kernel] if arch == WGMMA_ARCH else MMA


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="tests.support.compile_check", description=__doc__.splitlines()[0])
    known = [f"sm_{arch}" for arch in SHARED_BYTES]
    parser.add_argument("--arch", nargs="+", default=known, choices=known)
    parser.add_argument("--only", default="", metavar="REGEX", help="names to compile (default: all)")
    args = parser.parse_args(argv)
    triton.knobs.compilation.always_compile = True
    faulty = total = 0
    for compiled in check([int(arch.removeprefix("sm_")) for arch in args.arch], args.only):
        sys.stdout.write(f"{compiled}\n")
        sys.stdout.flush()
        total += 1
        faulty += bool(compiled.faults)
    sys.stdout.write(f"triton {triton.__version__}: {total} kernels, {faulty} with faults\n")
    return 1 if faulty or not total else 0


if __name__ == "__main__":
    sys.exit(main())
