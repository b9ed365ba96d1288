"""Triton kernels for NVIDIA GPUs, each file one operation: launcher and jitted body.

Nothing here waits for the device, and launch shapes follow from tensor shapes alone, so that a CUDA
graph can capture any of it. Importing an operation's file needs triton; this file does not.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch


def is_interpreted() -> bool:
    """Triton runs kernels in its interpreter: slow, on CPU tensors, for tests. Decided before triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def is_available(device: torch.device) -> bool:
    """True when the kernels of this folder can run on tensors of `device`."""
    return _has_triton() and (device.type == "cuda" or (device.type == "cpu" and is_interpreted()))


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
