"""ExpertCompute: the arithmetic of a group of experts, by the best kernel there is for them.

A segment's numbers depend on its tokens and its weights alone: not on where the weights lie, on the other segments
of the call, or on the resident experts. So every cache gives the same bits. Knows no cache.

Shape alphabet: T tokens, P (token, choice) pairs sorted by expert, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from expert_cache.storage import ExpertWeights
from moe_serve_kernels.cpu import expert_layer
from moe_serve_kernels.cpu import expert_mlp as native
from moe_serve_kernels.cpu.expert_mlp import Activation, Matrix, MLPWeights, StartedMLP

Segment = tuple[int, int]
"""(start, end) among the P pairs: those of one expert."""

PreparedWeights = ExpertWeights | MLPWeights


class ExpertCompute:
    """One model's expert function on one device."""

    def __init__(self, activation: Activation, dtype: torch.dtype, device: torch.device, matrix_tokens: int) -> None:
        """`dtype` of the activations. From `matrix_tokens` tokens per expert on, torch multiplies in `dtype`
        itself: worth it where the CPU has matrix instructions for it (AMX, AVX512-BF16) or on a GPU."""
        self.activation = activation
        self._dtype = dtype
        self._device = device
        self._matrix_tokens = matrix_tokens

    @property
    def runs_layers(self) -> bool:
        """Whether whole layers can be run at once where their experts are all in place (expert_layer.py)."""
        is_ours = self._dtype in (torch.float32, torch.bfloat16) and native.has_function(self.activation)
        return is_ours and expert_layer.is_available(self._device, torch.float32)

    @property
    def _rounds(self) -> bool:
        """Whether tokens are rounded to bf16 where they meet bf16 weights: the kernels multiply these faster."""
        return self._dtype == torch.bfloat16

    def prepare(self, weights: ExpertWeights) -> PreparedWeights:
        """Done once for each expert that comes in: the form that `run` takes."""
        rows = (weights.gate, weights.up, weights.down)
        available = native.is_available(self._device, native.weight_kind(weights.gate), torch.float32)
        available = available and native.has_function(self.activation)
        if not available or not native.are_readable(rows) or self._matrix_tokens == 0:
            return weights
        return MLPWeights(*rows, weights.gate_bias, weights.up_bias, weights.down_bias, rounds=self._rounds)

    def result_like(self, hidden: torch.Tensor, num_pairs: int) -> torch.Tensor:
        """Uninitialised [P, H] for `run`: float32 at least, so that nothing is rounded before the sum."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        return torch.empty(num_pairs, hidden.shape[1], dtype=dtype, device=hidden.device)

    def run(
        self,
        hidden: torch.Tensor,
        tokens: torch.Tensor,
        segments: Sequence[Segment],
        weights: Sequence[PreparedWeights],
        out: torch.Tensor,
    ) -> None:
        """Fill the rows of `out` that lie in `segments`, one expert each.

        hidden [T, H] in the compute dtype; tokens [P] int64: the row of `hidden` of each pair.
        """
        fused_segments: list[Segment] = []
        fused_weights: list[MLPWeights] = []
        x = hidden.to(torch.float32).contiguous()
        for (start, end), expert in zip(segments, weights, strict=True):
            if isinstance(expert, MLPWeights) and end - start < self._matrix_tokens:
                fused_segments.append((start, end))
                fused_weights.append(expert)
            elif not isinstance(expert, MLPWeights) and self._runs_copies:
                native.expert_mlp(
                    x, tokens, [(start, end)], [_readable_copy(expert, self._rounds)], self.activation, out
                )
            else:
                for rows in self._rows_at_once(start, end):
                    out[rows] = self._in_torch(hidden.index_select(0, tokens[rows]), expert)
        native.expert_mlp(x, tokens, fused_segments, fused_weights, self.activation, out)

    def _rows_at_once(self, start: int, end: int) -> list[slice]:
        """Where only the activation is unknown to the kernels, a row at a time: torch's sums depend on how many there
        are."""
        if self._device.type != "cpu" or native.has_function(self.activation):
            return [slice(start, end)]
        return [slice(row, row + 1) for row in range(start, end)]

    @property
    def _runs_copies(self) -> bool:
        """Whether the kernel also runs what it cannot read: torch's sums depend on how many tokens there are."""
        known = native.has_function(self.activation)
        available = known and native.is_available(self._device, "float32", torch.float32)
        return self._dtype in (torch.float32, torch.bfloat16) and available

    def start(
        self, hidden: torch.Tensor, tokens: torch.Tensor, segment: Segment, weights: PreparedWeights
    ) -> StartedMLP | None:
        """The first half of one expert: gate, up and activation. None if only the whole can be run."""
        if not isinstance(weights, MLPWeights) or segment[1] - segment[0] >= self._matrix_tokens:
            return None
        x = hidden.to(torch.float32).contiguous()
        return native.start_expert_mlp(x, tokens, segment, weights, self.activation)

    def finish(self, started: StartedMLP, out: torch.Tensor) -> None:
        """The second half: down. Together the same bits as `run`."""
        native.finish_expert_mlp(started, out)

    def combine(self, pairs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Each token's weighted sum: pairs [T * K, H] in the router's order, as `result_like` makes them, weights
        [T, K] -> [T, H] in the dtype of `pairs`."""
        if expert_layer.is_available(self._device, pairs.dtype):
            return expert_layer.combine(pairs, weights)
        return (pairs.view(*weights.shape, -1) * weights[..., None]).sum(dim=1)

    def _in_torch(self, x: torch.Tensor, expert: PreparedWeights) -> torch.Tensor:
        """x [t, H] -> [t, H] without our kernels."""
        gate = _linear(x, expert.gate, expert.gate_bias)
        up = _linear(x, expert.up, expert.up_bias)
        return _linear(native.activate(self.activation, gate, up), expert.down, expert.down_bias)


def _readable_copy(expert: ExpertWeights, rounds: bool) -> MLPWeights:
    """Of weights that lie by columns (GPT-OSS) or in a format that the kernel does not know: one expert at a time."""
    matrices = (expert.gate, expert.up, expert.down)
    is_bf16 = all(isinstance(m, torch.Tensor) and m.dtype == torch.bfloat16 for m in matrices)
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    rows = [native.as_tensor(m, dtype).contiguous() for m in matrices]
    biases = (expert.gate_bias, expert.up_bias, expert.down_bias)
    return MLPWeights(*rows, *(None if bias is None else bias.to(torch.float32) for bias in biases), rounds=rounds)


def _linear(x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None) -> torch.Tensor:
    """A copy of strided rows is made so that the layout cannot choose another summation order."""
    rows = native.as_tensor(weight, x.dtype).contiguous()
    return torch.nn.functional.linear(x, rows, None if bias is None else bias.to(x.dtype))
