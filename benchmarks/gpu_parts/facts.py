"""Part `facts`: what this machine is, and its rates: pinning, both ways of the link, a large copy, a matrix product."""

from __future__ import annotations

import importlib
import sys
import time
from typing import Any

import torch
from gpu_parts.lines import Lines, device, is_simulated, memory, seconds_of
from measuring import hardware, versions

NEEDED = ("transformers", "tokenizers", "safetensors", "gguf", "msgspec", "xxhash", "llguidance", "triton", "pytest")


def main() -> int:
    lines = Lines("facts")
    with lines.row(what="machine") as row:
        row |= {"hardware": hardware(), "versions": versions(), **_gpu(), **memory()}
    with lines.row(what="imports") as row:
        row["missing"] = [name for name in NEEDED if not _imports(name)]
        assert not row["missing"], "carry them as wheels: benchmarks/gpu_wheels.sh"
    pin_bytes, link_bytes, side = (1 << 20, 1 << 20, 64) if is_simulated() else (8 << 30, 1 << 30, 8192)
    with lines.row(what="pinning", bytes=pin_bytes) as row:
        row["seconds"] = _pinning_s(pin_bytes)
    with lines.row(what="link", bytes=link_bytes) as row:
        row |= _link(link_bytes)
    with lines.row(what="limits") as row:
        row |= limits(link_bytes, side)
    return lines.exit_status()


def _gpu() -> dict[str, Any]:
    if is_simulated():
        return {"gpu": "none: Triton's interpreter"}
    found: Any = torch.cuda.get_device_properties(0)
    names = ("major", "minor", "multi_processor_count", "shared_memory_per_block_optin", "L2_cache_size")
    return {"gpu": found.name} | {name: getattr(found, name) for name in names}


def _imports(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _pinning_s(num_bytes: int) -> float:
    """Of cudaHostAlloc, which a cache of experts in host memory waits for at the start."""
    start = time.perf_counter()
    torch.empty(num_bytes, dtype=torch.uint8, pin_memory=not is_simulated())
    return time.perf_counter() - start


def _link(num_bytes: int) -> dict[str, float]:
    """Bytes per second of one large copy from pinned memory, and of one back."""
    host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=not is_simulated())
    there = torch.empty(num_bytes, dtype=torch.uint8, device=device())
    to_gpu_s = seconds_of(lambda: there.copy_(host, non_blocking=True))
    back_s = seconds_of(lambda: host.copy_(there, non_blocking=True))
    return {"to_gpu_bytes_per_s": num_bytes / to_gpu_s, "from_gpu_bytes_per_s": num_bytes / back_s}


def limits(num_bytes: int, side: int) -> dict[str, float]:
    """What every fraction of a roofline is a fraction of: bytes/s of a copy (read and written), bf16 FLOP/s."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    copy_s = seconds_of(lambda: target.copy_(source))
    a, b = (torch.randn(side, side, device=device()).to(torch.bfloat16) for _ in range(2))
    product_s = seconds_of(lambda: torch.mm(a, b))
    return {"bytes_per_s": 2 * num_bytes / copy_s, "flop_per_s": 2 * side**3 / product_s}


if __name__ == "__main__":
    sys.exit(main())
