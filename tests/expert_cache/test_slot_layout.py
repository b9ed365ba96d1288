"""Experts of every stored form in a slot: the kernels' layout, and the numbers that the checkpoint means."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from expert_cache.gpu_managed import cache
from expert_cache.gpu_managed.cache import HostHeap
from expert_cache.gpu_managed.layout import SlotLayout, layout_of, slot_of_bank, write_slot
from expert_cache.gpu_managed.pool import SlotPool
from expert_cache.storage.store import ExpertWeights
from moe_serve_kernels.gpu.pool import ExpertPool
from tests.kernels.quantized_experts import Form
from tests.support.gpu_references import dequantize

from ..kernels.quantized_experts import FORMS, make_matrix
from . import stores
from .stores import plain

HIDDEN, INNER = 256, 128
CPU = torch.device("cpu")
KEPT = {
    "int8-g0-float32-r1": "int8",
    "uint8-g0-float16-r1": "int8",
    "fp8-g0-bfloat16-r1": "fp8",
    "fp8-g0-float32-r10000": "fp8",
    "int4-g128-bfloat16-r1": "int4",
    "int4-g128-float16-r1-zeros": "int4",
    "int4-g32-float32-r1": "int4",
    "int4-g64-float32-r1-zeros": "int4",
    "int8-g128-bfloat16-r1": "int8_groups",
    "fp8-g128-float32-r128": "fp8_blocks",
    "fp4-g32-uint8-r1": "mxfp4",
    "fp4-g16-float8_e4m3fn-r1": "nvfp4",
}
"""Forms that a kernel reads as they are; all others become floats."""


def written(weights: ExpertWeights, dtype: torch.dtype) -> tuple[SlotLayout, ExpertPool]:
    """The expert in slot 1 of a pool of 3."""
    layout = layout_of(weights, dtype)
    pool = layout.pool(3, CPU)
    write_slot(weights, layout, slot_of_bank(pool.gate_up, 1), slot_of_bank(pool.down, 1))
    return layout, pool


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_quantised(form: Form) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
    gate, up, down = (make_matrix(form, *shape, generator) for shape in shapes)
    weights = ExpertWeights(gate, up, down)
    kept = KEPT.get(str(form), "plain")
    layout, pool = written(weights, torch.float32 if kept == "plain" else torch.bfloat16)
    assert layout.format == kept
    both = torch.cat([m.dequantized(torch.float64) for m in (gate, up)])
    torch.testing.assert_close(dequantize(pool.gate_up, 1), both, rtol=1e-6, atol=0)
    torch.testing.assert_close(dequantize(pool.down, 1), down.dequantized(torch.float64), rtol=1e-6, atol=0)
    assert sum(layout.part_bytes()) == sum(t[1].nbytes for b in (pool.gate_up, pool.down) for t in b.parts().values())


class _OnTheCpu(TorchDispatchMode):
    """Notes operations on tensors of the CPU, but copies from there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.dim()]
        if any(tensor.device == CPU for tensor in tensors):
            self.names.add(func.overloadpacket.__name__)
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_codes_are_converted_on_the_device_of_the_slots(form: Form, dtype: torch.dtype) -> None:
    """Meta stands for a GPU: what reads codes there cannot run on the CPU."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
    gate, up, down = (make_matrix(form, *shape, generator) for shape in shapes)
    weights = ExpertWeights(gate, up, down)
    layout = layout_of(weights, dtype)
    pool = layout.pool(2, torch.device("meta"))
    with _OnTheCpu() as noted:
        write_slot(weights, layout, slot_of_bank(pool.gate_up, 1), slot_of_bank(pool.down, 1))
    assert noted.names <= {"_to_copy", "copy_", "detach", "lift_fresh", "alias"}


def test_codes_reach_host_memory_by_a_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a cache that the GPU manages: converted in the pool's first slot, they are what a direct write makes."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
    gate, up, down = (make_matrix(FORMS[0], *shape, generator) for shape in shapes)
    weights = ExpertWeights(gate, up, down)
    layout, expected = written(weights, torch.bfloat16)
    pool, host = SlotPool(layout, 2, CPU), layout.pool(1, CPU)
    monkeypatch.setattr("expert_cache.gpu_managed.cache.codes_on", lambda device, own: replace(own))
    cache._write(weights, pool, slot_of_bank(host.gate_up, 0), slot_of_bank(host.down, 0))
    for bank, wanted in ((host.gate_up, expected.gate_up), (host.down, expected.down)):
        for name, part in slot_of_bank(bank, 0).items():
            assert torch.equal(part, slot_of_bank(wanted, 1)[name]), name


@pytest.mark.parametrize("form", [form for form in FORMS if str(form) in KEPT], ids=str)
def test_codes_become_floats_for_float32(form: Form) -> None:
    """Whose exact products of codes fit into no registers."""
    matrix = make_matrix(form, 128, 128, torch.Generator())
    assert layout_of(ExpertWeights(matrix, matrix, matrix), torch.float32).format == "plain"


@pytest.mark.parametrize("name", stores.STORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_floats(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    store = stores.STORES[name][0](tmp_path)
    weights = store.weights(store.layers[1], 2)
    layout, pool = written(weights, dtype)
    assert layout.format == "plain"
    assert torch.equal(pool.gate_up.data[1], torch.stack([plain(weights.gate), plain(weights.up)]).to(dtype))
    assert torch.equal(pool.down.data[1], plain(weights.down).to(dtype))
    assert layout.has_bias == (name == "gpt_oss")
    if layout.has_bias:
        gate_bias, up_bias, down_bias = weights.gate_bias, weights.up_bias, weights.down_bias
        assert gate_bias is not None
        assert up_bias is not None
        assert down_bias is not None
        assert pool.gate_up.bias is not None
        assert pool.down.bias is not None
        assert torch.equal(pool.gate_up.bias[1], torch.stack([gate_bias, up_bias]).float())
        assert torch.equal(pool.down.bias[1], down_bias.float())


def test_a_heap_gives_aligned_pieces_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expert_cache.gpu_managed.cache.CHUNK_BYTES", 256)
    sizes = [100, 16, 300, 1, 77]
    heap = HostHeap(sum(-(-size // 16) * 16 for size in sizes), pinned=False)
    pieces = [heap.take(size) for size in sizes]
    assert [len(piece) for piece in pieces] == sizes
    spans = sorted((piece.data_ptr(), piece.data_ptr() + len(piece)) for piece in pieces)
    assert all(start % 16 == 0 for start, _ in spans)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
