"""A MoE layer whose experts are all in place, in one call: grouping, experts and the weighted sum.

    out[t] = sum over k of weights[t, k] * expert[ids[t, k]](x[t])

The experts' arithmetic is that of `expert_mlp`, bit for bit. Sums run in the router's order. `combine` makes the same
sums, bit for bit, from results computed by other calls.

Shape alphabet: T tokens, H hidden, E experts, K choices per token.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

from moe_serve_kernels.cpu import library
from moe_serve_kernels.cpu.expert_mlp import Activation, MLPWeights, activation_arguments
from moe_serve_kernels.cpu.library import native


class ExpertLayer:
    """All experts of one layer, of one shape and kind."""

    def __init__(self, experts: Sequence[MLPWeights]) -> None:
        self.experts = experts
        self._addresses = array("q", (expert.address for expert in experts))
        self.address = self._addresses.buffer_info()[0]
        """Of the table of experts."""

    def run(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, activation: Activation
    ) -> tuple[torch.Tensor, list[int]]:
        """x [T, H] float32, ids [T, K] int64, weights [T, K] -> [T, H], and the pairs that each expert had [E].

        Raises MemoryError.
        """
        assert x.dtype == torch.float32
        assert ids.dtype == torch.int64
        x, ids, weights = x.contiguous(), ids.contiguous(), weights.to(torch.float32).contiguous()
        out, counts = torch.empty_like(x), array("q", bytes(8 * len(self.experts)))
        tensors = (x.data_ptr(), ids.data_ptr(), weights.data_ptr(), out.data_ptr())
        kind = activation_arguments(activation)
        places = (counts.buffer_info()[0], self.address, len(self.experts))
        if not native().moe_serve_expert_layer(*tensors, *places, *ids.shape, *kind, torch.get_num_threads()):
            raise MemoryError("no memory for the scratch space of a layer's experts")
        return out, counts.tolist()


def combine(pairs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """pairs [T * K, H] float32 in the router's order, weights [T, K] -> [T, H]."""
    num_tokens, top_k = weights.shape
    assert pairs.dtype == torch.float32
    assert pairs.is_contiguous()
    weights = weights.to(torch.float32).contiguous()
    out = pairs.new_empty(num_tokens, pairs.shape[1])
    arrays = (pairs.data_ptr(), None, weights.data_ptr(), out.data_ptr())
    native().moe_serve_combine(*arrays, num_tokens, top_k, pairs.shape[1], torch.get_num_threads())
    return out


def is_available(device: torch.device, dtype: torch.dtype) -> bool:
    """True when activations of `dtype` can be combined, and experts that the kernel reads be run, here."""
    return device.type == "cpu" and dtype == torch.float32 and library.load() is not None
