"""Paged decoding against the float64 reference; unused pages hold NaN, so that reading one shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_serve_kernels.gpu import paged_attention as module
from moe_serve_kernels.gpu.paged_attention import paged_decode
from tests.support.cpu_references import paged_decode_reference

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Query, keys, values, page table, lengths."""
Shape = tuple[int, int, int, int, int, int, int]
"""Sequences, longest context, KV heads, group, key dim, value dim, page size."""
LatentShape = tuple[int, int, int, int, int, int]
"""Sequences, longest context, group, rank, rest, page size."""

SHAPES: list[Shape] = [
    (3, 40, 2, 4, 32, 32, 16),
    (1, 1, 1, 1, 64, 64, 16),
    (2, 70, 2, 3, 24, 16, 8),
    (2, 50, 1, 8, 192, 128, 16),
    (3, 19, 1, 20, 16, 48, 5),
]

LATENTS: list[LatentShape] = [
    (3, 40, 16, 32, 16, 16),
    (2, 70, 3, 24, 10, 8),
    (1, 1, 1, 64, 8, 16),
    (2, 19, 20, 16, 16, 5),
    (1, 33, 40, 40, 64, 16),
]


def case(
    seqs: int,
    longest: int,
    kv_heads: int,
    groups: int,
    key_dim: int,
    value_dim: int,
    page_size: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensors:
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
    query, keys, values = (t.to(device, dtype) for t in (query, keys, values))
    return query, keys, values, table.to(device), lengths.to(device)


def check(tensors: Tensors, page_size: int, tolerance: float, **settings: Any) -> None:
    query, keys, values, table, lengths = tensors
    got = paged_decode(query, keys, values, table, lengths, page_size=page_size, **settings)
    wide = (query.double(), keys.double(), values.double(), table, lengths)
    expected = paged_decode_reference(*wide, page_size=page_size, **settings)
    assert got.dtype == query.dtype
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_shapes(device: torch.device, shape: Shape, window: int | None, with_sinks: bool) -> None:
    tensors = case(*shape, device)
    sinks = torch.randn(tensors[0].shape[1], device=device) if with_sinks else None
    check(tensors, shape[-1], 5e-6, scale=0.2, window=window, sinks=sinks)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_narrow_types(device: torch.device, dtype: torch.dtype, tolerance: float) -> None:
    check(case(*SHAPES[0], device, dtype), 16, tolerance, scale=0.2)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(("with_sinks", "sizes"), [(False, 1), (True, 1), (False, 2)])
def test_several_splits(
    device: torch.device, window: int | None, with_sinks: bool, sizes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 64 tokens, 128 and so on."""
    monkeypatch.setattr(module, "SPLIT_TOKENS", 64)
    monkeypatch.setattr(module, "SPLITS_OF_A_SIZE", sizes)
    tensors = case(2, 210, 1, 2, 16, 16, 16, device)
    sinks = torch.randn(2, device=device) if with_sinks else None
    check(tensors, 16, 5e-6, scale=0.3, window=window, sinks=sinks)


def test_splits_cover_contexts() -> None:
    """In the places where the kernels look for them."""
    assert [module.splits_of(tokens) for tokens in (0, 1, 512, 513, 8192, 8193, 24576, 131072)] == [
        *(1, 1, 1, 2, 16, 17, 32, 65)
    ]


def test_large_scores_do_not_overflow(device: torch.device) -> None:
    query, keys, values, table, lengths = case(*SHAPES[0], device)
    check((query * 300, keys, values, table, lengths), 16, 1e-3, scale=1.0)


def check_alone(tensors: Tensors) -> None:
    """A sequence depends neither on its neighbours nor on how wide the page table is."""
    query, keys, values, table, lengths = tensors
    settings: dict[str, Any] = {"page_size": 16, "scale": 0.2}
    together = paged_decode(query, keys, values, table, lengths, **settings)
    wider = torch.nn.functional.pad(table[1:2], (0, 60))
    alone = paged_decode(query[1:2], keys, values, wider, lengths[1:2], **settings)
    assert torch.equal(together[1:2], alone)


def test_a_sequence_does_not_depend_on_its_neighbours(device: torch.device) -> None:
    check_alone(case(*SHAPES[0], device))


def test_a_table_that_is_the_beginning_of_a_longer_one(device: torch.device) -> None:
    query, keys, values, table, lengths = case(*SHAPES[0], device)
    longer = torch.nn.functional.pad(table, (0, 7), value=10_000)
    settings: dict[str, Any] = {"page_size": 16, "scale": 0.2}
    expected = paged_decode(query, keys, values, table, lengths, **settings)
    assert torch.equal(paged_decode(query, keys, values, longer[:, : table.shape[1]], lengths, **settings), expected)


def test_no_sequences(device: torch.device) -> None:
    query, keys, values, table, lengths = case(*SHAPES[0], device)
    out = paged_decode(query[:0], keys, values, table[:0], lengths[:0], page_size=16, scale=1.0)
    assert out.shape == (0, 8, 32)


def latent_case(
    seqs: int,
    longest: int,
    groups: int,
    rank: int,
    rest: int,
    page_size: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    kv_heads: int = 1,
) -> Tensors:
    """As a latent cache has it: the values are the beginnings of the keys' rows."""
    shape = (seqs, longest, kv_heads, groups, rank + rest, 1, page_size)
    query, keys, _, table, lengths = case(*shape, device, dtype)
    return query, keys, keys[:, :, :rank], table, lengths


@pytest.mark.parametrize("shape", LATENTS)
def test_latent_shapes(device: torch.device, shape: LatentShape) -> None:
    check(latent_case(*shape, device), shape[-1], 5e-6, scale=0.2)


@pytest.mark.parametrize("window", [None, 7])
def test_latents_of_two_heads_with_window_and_sinks(device: torch.device, window: int | None) -> None:
    tensors = latent_case(2, 40, 20, 16, 8, 16, device, kv_heads=2)
    check(tensors, 16, 5e-6, scale=0.2, window=window, sinks=torch.randn(40, device=device))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_narrow_latents(device: torch.device, dtype: torch.dtype, tolerance: float) -> None:
    check(latent_case(*LATENTS[0], device, dtype), 16, tolerance, scale=0.2)


def test_several_splits_of_latents(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SPLIT_TOKENS", 64)
    check(latent_case(2, 150, 20, 24, 10, 16, device), 16, 5e-6, scale=0.3)


def test_latents_of_a_sequence_do_not_depend_on_its_neighbours(device: torch.device) -> None:
    check_alone(latent_case(*LATENTS[0], device))


def test_latents_are_read_as_values_of_their_own_are(device: torch.device) -> None:
    """Another block size, so another order of summation."""
    query, keys, values, table, lengths = latent_case(*LATENTS[0], device)
    settings: dict[str, Any] = {"page_size": 16, "scale": 0.2}
    apart = paged_decode(query, keys, values.contiguous(), table, lengths, **settings)
    got = paged_decode(query, keys, values, table, lengths, **settings)
    torch.testing.assert_close(got, apart, rtol=0, atol=5e-6)
