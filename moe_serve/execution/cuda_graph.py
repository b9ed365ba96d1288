"""CudaCapture: the one place where work becomes a CUDA graph.

Everything in it needs a GPU. Its users take it as an argument, so they can be tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

WARM_UPS = 2
"""The first run compiles kernels and lets libraries take their workspaces, neither of which can be captured."""


class Capture(Protocol):
    """Turns work over fixed tensors into something that can be repeated without Python."""

    def __call__(self, work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        """(the tensor that `work` returned, and what fills it again)."""
        ...


class CudaCapture:
    """Graphs that share one pool of memory, because only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        """See Capture. RuntimeError: the work does something that cannot be captured."""
        with torch.cuda.device(self._device):
            self._warm_up(work)
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on using the GPU meanwhile.
            with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
                out = work()
        return out, graph.replay

    def _warm_up(self, work: Callable[[], torch.Tensor]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
