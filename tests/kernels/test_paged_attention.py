"""The C++ paged attention against its torch reference in float64, and the gathered torch path against both."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_serve.execution.forward_batch import DecodeGroup
from moe_serve.execution.kv_cache import LayerKV, LayerKVShape, Scratch
from moe_serve.hf.attend import Attend
from moe_serve_kernels.cpu import library, paged_attention
from tests.support.cpu_references import paged_decode_reference

CPU = torch.device("cpu")
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Query, keys, values, page table, lengths."""
needs_library = pytest.mark.skipif(library.load() is None, reason="C++ kernels are not built here (no compiler)")
Shape = tuple[int, int, int, int, int, int, int]
"""Sequences, longest context, KV heads, group, key dim, value dim, page size."""
SHAPES: list[Shape] = [
    (5, 40, 2, 4, 32, 32, 16),
    (1, 1, 1, 1, 64, 64, 16),
    (3, 33, 4, 1, 128, 128, 4),
    (4, 70, 2, 3, 24, 16, 8),
    (2, 50, 1, 8, 192, 128, 16),
    (3, 19, 3, 2, 96, 96, 5),
    (2, 30, 2, 21, 160, 208, 4),
]


def case(seqs: int, longest: int, kv_heads: int, groups: int, key_dim: int, value_dim: int, page_size: int) -> Tensors:
    """Random tensors with shuffled pages; unused slots hold NaN, so that reading one shows."""
    torch.manual_seed(seqs * longest)
    width = -(-longest // page_size)
    pages = torch.randperm(seqs * width + 3)
    table = pages[: seqs * width].view(seqs, width).contiguous()
    lengths = torch.linspace(longest, max(1, longest // 3), seqs).long()
    keys = torch.full((kv_heads, len(pages) * page_size, key_dim), torch.nan)
    values = torch.full((kv_heads, len(pages) * page_size, value_dim), torch.nan)
    for n in range(seqs):
        positions = torch.arange(int(lengths[n]))
        slots = table[n][positions // page_size] * page_size + positions % page_size
        keys[:, slots] = torch.randn(kv_heads, len(slots), key_dim)
        values[:, slots] = torch.randn(kv_heads, len(slots), value_dim)
    query = torch.randn(seqs, kv_heads * groups, key_dim)
    return query, keys, values, table, lengths


@needs_library
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_native_matches_the_reference(shape: Shape, window: int | None, with_sinks: bool) -> None:
    query, keys, values, table, lengths = case(*shape)
    sinks = torch.randn(query.shape[1]) if with_sinks else None
    settings: dict[str, Any] = {"page_size": shape[-1], "scale": 0.2, "window": window, "sinks": sinks}
    got = paged_attention.paged_attention(query, keys, values, table, lengths, **settings)
    wide = (query.double(), keys.double(), values.double(), table, lengths)
    expected = paged_decode_reference(*wide, **settings)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=3e-6)


@needs_library
@pytest.mark.parametrize(("rank", "rotary"), [(64, 16), (20, 6), (512, 64)])
@pytest.mark.parametrize("heads", [3, 16, 19])
def test_values_that_are_the_beginnings_of_keys(rank: int, rotary: int, heads: int) -> None:
    query, keys, _, table, lengths = case(3, 45, 1, heads, rank + rotary, 1, 16)
    values = keys[..., :rank]
    settings: dict[str, Any] = {"page_size": 16, "scale": 0.1}
    got = paged_attention.paged_attention(query, keys, values, table, lengths, **settings)
    expected = paged_decode_reference(query.double(), keys.double(), values.double(), table, lengths, **settings)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=3e-6)


@needs_library
def test_a_head_does_not_depend_on_its_neighbours() -> None:
    query, keys, values, table, lengths = case(2, 30, 1, 21, 160, 208, 4)
    together = paged_attention.paged_attention(query, keys, values, table, lengths, page_size=4, scale=0.1)
    alone = paged_attention.paged_attention(
        query[:, 5:6].contiguous(), keys, values, table, lengths, page_size=4, scale=0.1
    )
    assert torch.equal(together[:, 5:6], alone)


@needs_library
def test_large_scores_do_not_overflow() -> None:
    query, keys, values, table, lengths = case(*SHAPES[0])
    got = paged_attention.paged_attention(query * 300, keys, values, table, lengths, page_size=16, scale=1.0)
    wide = (query.double() * 300, keys.double(), values.double(), table, lengths)
    expected = paged_decode_reference(*wide, page_size=16, scale=1.0)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_gathered_path_matches_the_reference(window: int | None, with_sinks: bool) -> None:
    """The path of machines without a compiler, of bf16 and of GPUs."""
    shape = SHAPES[0]
    query, keys, values, table, lengths = case(*shape)
    layer = LayerKV(LayerKVShape(2, 32, 32), keys.shape[1] // 16, 16, torch.float32, CPU, Scratch())
    layer.keys.copy_(keys.nan_to_num())
    layer.values.copy_(values.nan_to_num())
    sinks = torch.randn(query.shape[1]) if with_sinks else None
    group = DecodeGroup(0, table, lengths, int(lengths.max()), even=False, single_run=None)
    got = Attend(0.2, window, sinks)._decode_gathered(query.transpose(0, 1), layer, group)
    settings: dict[str, Any] = {"page_size": 16, "scale": 0.2, "window": window, "sinks": sinks}
    expected = paged_decode_reference(query, keys, values, table, lengths, **settings)
    torch.testing.assert_close(got, expected, rtol=0, atol=3e-6)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [None, 7])
def test_parts_of_prompts_get_the_bits_of_single_tokens(shape: Shape, window: int | None, dtype: torch.dtype) -> None:
    """Sequences with all, some and one of their tokens in the step; what some see begins late."""
    query, keys, values, table, lengths = case(*shape)
    keys, values = keys.to(dtype), values.to(dtype)
    counts = [int(length) if n % 2 == 0 else 1 + n for n, length in enumerate(lengths.tolist())]
    firsts = torch.tensor([n % 2 * 2 for n in range(len(counts))])
    starts = torch.tensor([0, *counts]).cumsum(0)
    several = torch.randn(int(starts[-1]), *query.shape[1:]).to(dtype)
    settings: dict[str, Any] = {
        "page_size": shape[-1],
        "scale": 0.2,
        "window": window,
        "sinks": torch.randn(query.shape[1]),
    }
    seen = lengths - torch.tensor(counts) + 1
    firsts = torch.minimum(firsts, seen - 1)
    together = paged_attention.paged_attention(
        several, keys, values, table, seen, starts=starts, firsts=firsts, **settings
    )
    assert together.dtype == dtype
    for n, count in enumerate(counts):
        for i in range(count):
            one, row = slice(n, n + 1), int(starts[n]) + i
            own = keys, values, table[one], seen[one] + i
            alone = paged_attention.paged_attention(several[row : row + 1], *own, firsts=firsts[one], **settings)
            assert torch.equal(alone, together[row : row + 1])


@needs_library
def test_a_context_that_begins_late_is_that_of_a_window() -> None:
    query, keys, values, table, lengths = case(5, 40, 2, 4, 32, 32, 16)
    settings: dict[str, Any] = {"page_size": 16, "scale": 0.2}
    late = paged_attention.paged_attention(query, keys, values, table, lengths, firsts=lengths - 3, **settings)
    assert torch.equal(late, paged_attention.paged_attention(query, keys, values, table, lengths, window=3, **settings))
