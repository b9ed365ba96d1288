"""What the choice of a configuration depends on in a GPU: its generation and the shared memory of one block."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class GpuModel:
    """One kind of GPU."""

    capability: int
    """10 * major + minor."""
    shared_bytes: int
    """The most shared memory that one block can ask for."""


SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""By compute capability (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability")."""
INTERPRETED = 90


def known(capability: int) -> GpuModel:
    """A GPU that need not be here. KeyError: its shared memory is not in SHARED_BYTES."""
    return GpuModel(capability, SHARED_BYTES[capability])


@functools.cache
def model_of(device: torch.device) -> GpuModel:
    """The GPU at hand; in Triton's interpreter, one of INTERPRETED's generation."""
    if device.type != "cuda":
        return known(INTERPRETED)
    found: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack the shared memory
    return GpuModel(10 * found.major + found.minor, found.shared_memory_per_block_optin)


@functools.cache
def device_name(device: torch.device) -> str:
    """The GPU's name as its driver gives it."""
    return torch.cuda.get_device_name(device)
