"""Part `kernels`: single kernels against this GPU's limits, each in a graph with a cold L2 cache.

In this order: MoE layers by format, model and tokens; torch's grouped_mm beside them; decoding attention; one expert's
way over the link by number of copying programs; the GEMV by depth of its pipeline. Floors are bytes or operations over
the limits that are measured first.

Shape alphabet: T tokens, K choices, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from bench_kernels import BYTES_PER_WEIGHT, MODELS
from gpu_parts import calls, facts
from gpu_parts.lines import Lines, device, is_simulated, seconds_of, seconds_per_call
from kernel_peers import torch_grouped

from moe_serve_kernels.cpu.expert_mlp import Activation
from moe_serve_kernels.gpu import residency
from moe_serve_kernels.gpu.configs import GEMV, Config, GemvConfig
from moe_serve_kernels.gpu.moe_layer import config_for, moe_layer
from moe_serve_kernels.gpu.paged_attention import paged_decode
from moe_serve_kernels.gpu.pool import ExpertPool
from moe_serve_kernels.gpu.tuned import Shape
from moe_serve_kernels.gpu.weight_format import Format

SILU = Activation("silu")
POINTS: list[tuple[Format, str, tuple[int, ...]]] = [
    ("plain", "mixtral", (1, 16, 256, 2048)),
    ("plain", "qwen3", (1, 16, 256, 2048)),
    ("int4", "mixtral", (1, 16, 256)),
    ("int4", "qwen3", (1, 16, 256)),
    ("fp8", "mixtral", (1, 16, 2048)),
    ("fp8", "qwen3", (1, 16, 2048)),
]
"""The most wanted first."""
SIMULATED_POINTS: list[tuple[Format, str, tuple[int, ...]]] = [("plain", "tiny", (1, 9)), ("int8", "tiny", (1,))]
TINY = (32, 32, 4, 2)
ATTENTION = ((1, 1024), (1, 32768), (64, 2048))
"""Sequences and their context."""
PROGRAMS = (8, 16, 32, 64)
STAGES = (1, 2, 3, 4)


def main() -> int:
    lines = Lines("kernels")
    limits: dict[str, float] = {}
    with lines.row(what="limits") as row:
        limits = facts.limits(1 << 20 if is_simulated() else 1 << 30, 64 if is_simulated() else 8192)
        row |= limits
    for format, model, counts in SIMULATED_POINTS if is_simulated() else POINTS:
        _layers(lines, format, model, counts, limits)
    for seqs, context in ((1, 40),) if is_simulated() else ATTENTION:
        with lines.row(what="decoding attention", seqs=seqs, context=context) as row:
            row |= _attention(seqs, context, limits)
    for programs in PROGRAMS[:1] if is_simulated() else PROGRAMS:
        with lines.row(what="copy of an expert", programs=programs) as row:
            row |= _copy(programs)
    for stages in STAGES[:1] if is_simulated() else STAGES:
        _pipelines(lines, stages)
    return lines.exit_status()


def _shape(model: str, format: Format) -> Shape:
    return Shape(*(TINY if model == "tiny" else MODELS[model]), format)


def _layers(lines: Lines, format: Format, model: str, counts: tuple[int, ...], limits: dict[str, float]) -> None:
    shape = _shape(model, format)
    pool, tables = calls.layers_of(shape)
    for num_tokens in counts:
        case = Case(shape, num_tokens)
        with lines.row(what="layer", model=model, format=format, tokens=num_tokens) as row:
            row |= case.timed([case.ours(table, pool) for table in tables], limits)
            row["config"] = str(config_for(case.x, case.ids, shape.num_experts, pool))
        if format == "plain":
            with lines.row(what="torch grouped_mm", model=model, tokens=num_tokens) as row:
                row |= case.timed([case.torch_grouped(pool, layer) for layer in range(len(tables))], limits)


class Case:
    """One call: inputs with uniform random routing, and what it must read and compute at least."""

    def __init__(self, shape: Shape, num_tokens: int) -> None:
        scores = torch.rand(num_tokens, shape.num_experts, device=device())
        self.weights, self.ids = scores.topk(shape.top_k)
        self.x = torch.randn(num_tokens, shape.hidden, device=device()).to(calls.dtype())
        self._shape = shape
        per_expert = 3 * shape.hidden * shape.inner
        touched = self.ids.unique().numel()
        self._bytes = touched * per_expert * BYTES_PER_WEIGHT[shape.format] + 2 * self.x.nbytes
        self._flop = 2.0 * self.ids.numel() * per_expert

    def ours(self, table: torch.Tensor, pool: ExpertPool, config: Config | None = None) -> Callable[[], object]:
        """Our kernels over the layer with that slot table."""
        return partial(moe_layer, self.x, self.ids, self.weights, table, pool, SILU, config)

    def torch_grouped(self, pool: ExpertPool, layer: int) -> Callable[[], object]:
        """torch's grouped products over the same layer's slots, in order."""
        slots = slice(layer * self._shape.num_experts, (layer + 1) * self._shape.num_experts)
        run = torch_grouped(pool.gate_up.data[slots].flatten(1, 2), pool.down.data[slots])
        return lambda: run(self.x, self.ids, self.weights)

    def timed(self, work: list[Callable[[], object]], limits: dict[str, float]) -> dict[str, float]:
        """Seconds of one of `work`, its rates, and the fraction of the time that the limits allow."""
        seconds = seconds_per_call(work)
        floor_s = max(self._bytes / limits["bytes_per_s"], self._flop / limits["flop_per_s"])
        rates = {"bytes_per_s": self._bytes / seconds, "flop_per_s": self._flop / seconds}
        return {"seconds": seconds, "roofline_frac": floor_s / seconds} | rates


def _attention(seqs: int, context: int, limits: dict[str, float]) -> dict[str, float]:
    kv_heads, dim, page = (1, 32, 16) if is_simulated() else (8, 128, 16)
    width = -(-context // page)
    table = torch.randperm(seqs * width, device=device()).view(seqs, width)
    keys, values = (
        torch.randn(kv_heads, seqs * width * page, dim, device=device()).to(calls.dtype()) for _ in range(2)
    )
    query = torch.randn(seqs, 4 * kv_heads, dim, device=device()).to(calls.dtype())
    lengths = torch.full((seqs,), context, device=device())
    seconds = seconds_per_call(
        [partial(paged_decode, query, keys, values, table, lengths, page_size=page, scale=dim**-0.5)]
    )
    num_bytes = 2 * seqs * context * kv_heads * dim * keys.element_size()
    return {"seconds": seconds, "roofline_frac": num_bytes / limits["bytes_per_s"] / seconds}


def _copy(programs: int) -> dict[str, float]:
    """Of the 9 MiB of a Qwen3-30B expert in bf16."""
    with mock.patch.object(residency, "COPY_PROGRAMS", programs):
        again = calls.copying(large=not is_simulated())
        seconds = seconds_of(again.run)
    return {"seconds": seconds, "bytes": again.num_bytes, "bytes_per_s": again.num_bytes / seconds}


def _pipelines(lines: Lines, stages: int) -> None:
    """T = 1, where nothing but the rate of loads counts."""
    full: list[tuple[Format, str]] = [("plain", "qwen3"), ("int4", "mixtral")]
    small: list[tuple[Format, str]] = [("plain", "tiny")]
    for format, model in small if is_simulated() else full:
        known: Any = GEMV[format]
        config = GemvConfig(*(dataclasses.replace(part, num_stages=stages) for part in (known.gate_up, known.down)))
        shape = _shape(model, format)
        with lines.row(what="stages of the GEMV", model=model, format=format, stages=stages) as row:
            pool, tables = calls.layers_of(shape)
            case = Case(shape, 1)
            row["seconds"] = seconds_per_call([case.ours(table, pool, config) for table in tables])


if __name__ == "__main__":
    sys.exit(main())
