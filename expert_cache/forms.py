"""Compute-ready forms of one expert: the same weights, laid out for one way of multiplying.

rows      [out, in], as checkpoints store it. Costs no memory when the dtype fits (F.linear) or our
          kernel reads bf16 in place for float32 activations, at half the bytes per weight.
columns   [in, out], contiguous; x @ W. Fastest at every token count for experts that fit in L2.
packed    oneDNN's blocked layout; 2x F.linear from 4 tokens on, 1.2x our kernel from 9 on.

Which one wins was measured per size and token count (docs/log.md, 2026-11-21, and
shared/design/notes/kernels.md section 4); `FormRules` holds the outcome. Knows nothing of budgets.

Shape alphabet: t tokens routed to this expert, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from expert_cache.activations import Gate
from expert_cache.store import ExpertStore, ExpertWeights
from moe_serve_kernels.cpu import linear_rows

Linear = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class ExpertForm:
    """One expert, ready to run: x [t, H] -> [t, H]."""

    project_in: Linear
    """[t, H] -> [t, 2I]: gate, then up."""
    project_out: Linear
    """[t, I] -> [t, H]."""
    gate: Gate
    num_bytes: int
    """Anonymous memory it holds; 0 for views of the checkpoint."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.project_in(x).chunk(2, dim=-1)
        return self.project_out(self.gate(gate, up))


@dataclass(frozen=True, slots=True)
class FormRules:
    """Which form to use for how many tokens."""

    columns_max_elements: int
    """Experts whose in-projection has at most this many elements use `columns`."""
    packed_min_tokens: int
    """Larger experts use `packed` from this many tokens on, `rows` below."""

    def choose(self, in_elements: int, num_tokens: int, rows_are_free: bool) -> str:
        """Name of the form for an expert with `in_elements` in its in-projection.

        `rows_are_free`: the checkpoint's dtype is the compute dtype, or memory is plentiful. If
        not, a second form beside `packed` is not worth its memory for a 10 % gain below 4 tokens.
        """
        if in_elements <= self.columns_max_elements:
            return "columns"
        if num_tokens >= self.packed_min_tokens or (not rows_are_free and self.packs):
            return "packed"
        return "rows"

    @property
    def packs(self) -> bool:
        return self.packed_min_tokens < NEVER

    def names(self, in_elements: int, rows_are_free: bool) -> set[str]:
        """Every form these rules can ask for, over all token counts."""
        return {self.choose(in_elements, t, rows_are_free) for t in (1, NEVER - 1)}


NEVER = 1 << 60


def rules_for(store: ExpertStore, dtype: torch.dtype, device: torch.device, native_bf16: bool) -> FormRules:
    """The measured rules: float32 on CPU, bf16 with and without native arithmetic, GPU."""
    if device.type != "cpu" or dtype == torch.float16:
        return FormRules(columns_max_elements=0, packed_min_tokens=NEVER)
    if dtype == torch.bfloat16:
        return FormRules(columns_max_elements=0, packed_min_tokens=1 if native_bf16 else NEVER)
    in_place = _reads_in_place(store.weights(store.layers[0], 0), dtype)
    return FormRules(columns_max_elements=1 << 17, packed_min_tokens=9 if in_place else 4)


def rows_are_views(weights: ExpertWeights, dtype: torch.dtype, device: torch.device) -> bool:
    """True when the `rows` form needs no memory of its own."""
    same = weights.down.dtype == dtype and weights.down.device == device
    return same or (device.type == "cpu" and _reads_in_place(weights, dtype))


def _reads_in_place(weights: ExpertWeights, dtype: torch.dtype) -> bool:
    """True when our kernel multiplies activations of `dtype` by the weights as they are stored."""
    matrices = (weights.gate, weights.up, weights.down)
    return weights.gate_bias is None and all(linear_rows.is_available(m, dtype) for m in matrices)


def build(name: str, weights: ExpertWeights, gate: Gate, dtype: torch.dtype, device: torch.device) -> ExpertForm:
    """Make the form called `name` from an expert's stored weights."""
    maker = {"rows": _rows, "columns": _columns, "packed": _packed}[name]
    return maker(weights, gate, dtype, device)


def _rows(weights: ExpertWeights, gate: Gate, dtype: torch.dtype, device: torch.device) -> ExpertForm:
    if device.type == "cpu" and _reads_in_place(weights, dtype):
        return ExpertForm(_gate_up_in_place(weights), _linear_in_place(weights.down), gate, 0)
    is_view = rows_are_views(weights, dtype, device)
    down, down_bias = weights.down.to(device, dtype), _bias(weights.down_bias, dtype, device)
    if is_view and weights.gate_up is None:
        project_in = _separate_linear(weights)
    else:
        project_in = _linear(_in_matrix(weights).to(device, dtype), _in_bias(weights, dtype, device))
    num_bytes = 0 if is_view else weights.num_elements * dtype.itemsize
    return ExpertForm(project_in, _linear(down, down_bias), gate, num_bytes)


def _gate_up_in_place(weights: ExpertWeights) -> Linear:
    gate, up = weights.gate, weights.up
    inner = gate.shape[0]

    def project(x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(x.shape[0], 2 * inner)
        linear_rows.linear_rows(x, gate, out[:, :inner])
        linear_rows.linear_rows(x, up, out[:, inner:])
        return out

    return project


def _linear_in_place(matrix: torch.Tensor) -> Linear:
    return lambda x: linear_rows.linear_rows(x, matrix)


def _separate_linear(weights: ExpertWeights) -> Linear:
    """Gate and up as two products, so that neither has to be copied next to the other."""
    gate, up = weights.gate, weights.up
    gate_bias, up_bias = weights.gate_bias, weights.up_bias
    return lambda x: torch.cat([F.linear(x, gate, gate_bias), F.linear(x, up, up_bias)], dim=-1)


def _linear(matrix: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    return lambda x: F.linear(x, matrix, bias)


def _columns(weights: ExpertWeights, gate: Gate, dtype: torch.dtype, device: torch.device) -> ExpertForm:
    project_in = _column_product(_in_matrix(weights), _in_bias(weights, dtype, device), dtype, device)
    project_out = _column_product(weights.down, _bias(weights.down_bias, dtype, device), dtype, device)
    return ExpertForm(project_in, project_out, gate, weights.num_elements * dtype.itemsize)


def _column_product(
    matrix: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, device: torch.device
) -> Linear:
    columns = matrix.t().to(device, dtype).contiguous()
    if bias is None:
        return lambda x: torch.mm(x, columns)
    return lambda x: torch.addmm(bias, x, columns)


def _packed(weights: ExpertWeights, gate: Gate, dtype: torch.dtype, device: torch.device) -> ExpertForm:
    project_in = _packed_product(_in_matrix(weights).to(dtype), _in_bias(weights, dtype, device))
    project_out = _packed_product(weights.down.to(dtype), _bias(weights.down_bias, dtype, device))
    return ExpertForm(project_in, project_out, gate, weights.num_elements * dtype.itemsize)


def _packed_product(matrix: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    packed = torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), None)
    product = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: product(x, packed, bias, "none", [], "")


def _in_matrix(weights: ExpertWeights) -> torch.Tensor:
    """[2I, H] in the checkpoint's dtype: a view where the checkpoint has one, else a copy."""
    if weights.gate_up is not None:
        return weights.gate_up
    return torch.cat([weights.gate, weights.up], dim=0)


def _in_bias(weights: ExpertWeights, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    if weights.gate_bias is None or weights.up_bias is None:
        return None
    return torch.cat([weights.gate_bias, weights.up_bias]).to(device, dtype)


def _bias(bias: torch.Tensor | None, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    return None if bias is None else bias.to(device, dtype)
