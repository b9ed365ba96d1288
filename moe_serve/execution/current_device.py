"""Making a device the current one: Triton launches on the current GPU, whichever GPU holds the tensors."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Inside, `device` is this thread's current GPU. A thread's own is the first one. Nothing for a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
