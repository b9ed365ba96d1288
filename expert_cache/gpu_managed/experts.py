"""DeviceExperts: experts that a layer reaches from the router's choice on the GPU, without asking the host.

What a CUDA graph of a decoding step can hold. Two kinds: all experts in slots (resident.py), and a cache that the GPU
manages by itself (device_cache.py).

Shape alphabet: T tokens, H hidden, K choices, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from expert_cache.gpu_managed.compute import GpuCompute
from moe_serve_kernels.cpu.expert_layer import ExpertLayer


class DeviceExperts:
    """A whole layer in one call; nothing in it waits for the device, and its launches follow from shapes alone."""

    def __init__(self, compute: GpuCompute) -> None:
        self.compute = compute
        self.padding: torch.Tensor | None = None
        """[T, 1] bool: rows that only fill a batch up. Set while a step is captured that may have some."""

    def layers_in_place(self) -> Mapping[int, ExpertLayer]:
        """None for the CPU's kernels."""
        return {}

    def run(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Weighted sum of the chosen experts' outputs: hidden [T, H], ids and weights [T, K] -> [T, H].

        Rows that are padding choose nobody and get zeros.
        """
        if self.padding is not None:
            ids = ids.masked_fill(self.padding, -1)
        return self._run(layer, hidden, ids, weights)

    def _run(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The same; negative ids are nobody's choices."""
        raise NotImplementedError
