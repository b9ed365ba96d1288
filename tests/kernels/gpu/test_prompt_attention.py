"""Prompts of several sequences in one launch, against float64; unused pages hold NaN, so that reading one shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_serve_kernels.gpu.prompt_attention import Prompt, Prompts, Rest, attend_to_prompts, tiles_of

PAGE_SIZE = 4
RUNS = [(0, 5), (7, 9), (30, 37), (0, 1)]
"""Start and end of each prompt's part: a first chunk, a later one, one at a long context, a single token."""
Pages = list[torch.Tensor]


def pages_of(runs: list[tuple[int, int]]) -> tuple[Pages, int]:
    """The pages of each run, in no order, and how many there are with two that nothing owns."""
    counts = [-(-end // PAGE_SIZE) for _, end in runs]
    mixed = torch.randperm(sum(counts) + 2)
    return list(mixed[: sum(counts)].split(counts)), len(mixed)


def prompts_of(
    runs: list[tuple[int, int]], pages: Pages, groups: int, dtype: torch.dtype, device: torch.device
) -> Prompts:
    found, row, page = [], 1, 0  # row 0 is another sequence's
    for (start, end), own in zip(runs, pages, strict=True):
        found.append(Prompt(row, start, end, page))
        row, page = row + end - start, page + len(own)
    tiles = torch.tensor(tiles_of(found, groups, dtype), dtype=torch.int32, device=device)
    return Prompts(tiles, torch.cat(pages).to(device))


def reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: int,
    scale: float,
    window: int | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """query [n, Hq, D] at positions from `start` on; keys [Hk, C, D], values [Hk, C, Dv] of the context."""
    groups = query.shape[1] // len(keys)
    keys, values = keys.repeat_interleave(groups, 0).double(), values.repeat_interleave(groups, 0).double()
    scores = torch.einsum("nhd,hcd->hnc", query.double(), keys) * scale
    at, own = torch.arange(keys.shape[1]), torch.arange(start, start + len(query))[:, None]
    hidden = (at > own) if window is None else (at > own) | (at <= own - window)
    scores = scores.masked_fill(hidden.to(scores.device), float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, len(query), 1)], -1)
    weights = scores.softmax(-1)[..., : keys.shape[1]]
    return torch.einsum("hnc,hcv->nhv", weights, values)


def check(
    device: torch.device,
    kv_heads: int,
    groups: int,
    dim: int,
    value_dim: int,
    rest_dim: int = 0,
    window: int | None = None,
    with_sinks: bool = False,
    dtype: torch.dtype = torch.float32,
    tolerance: float = 5e-6,
) -> None:
    pages, num_pages = pages_of(RUNS)
    total = 1 + sum(end - start for start, end in RUNS)
    heads = kv_heads * groups
    query = torch.randn(total, heads, dim + rest_dim).to(device, dtype)
    sinks = torch.randn(heads).to(device, dtype) if with_sinks else None
    keys = torch.full((kv_heads, num_pages * PAGE_SIZE, dim), torch.nan).to(device, dtype)
    values = torch.full((kv_heads, num_pages * PAGE_SIZE, value_dim), torch.nan).to(device, dtype)
    rest = torch.full((num_pages * PAGE_SIZE, rest_dim), torch.nan).to(device, dtype)
    out = torch.full((total, heads, value_dim), 7.0).to(device, dtype)
    expected, row = out.double(), 1
    for (start, end), own in zip(RUNS, pages, strict=True):
        slots = (own[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()[:end]
        for tensor in (keys, values):
            tensor[:, slots] = torch.randn(kv_heads, end, tensor.shape[2]).to(device, dtype)
        rest[slots] = torch.randn(end, rest_dim).to(device, dtype)
        whole = torch.cat([keys[:, slots], rest[slots].expand(kv_heads, -1, -1)], -1)
        rows = slice(row, row + end - start)
        expected[rows] = reference(query[rows], whole, values[:, slots], start, 0.3, window, sinks)
        row += end - start
    prompts = prompts_of(RUNS, pages, groups, dtype, device)
    settings: dict[str, Any] = {"page_size": PAGE_SIZE, "scale": 0.3, "window": window, "sinks": sinks}
    second = Rest(query[..., dim:], rest) if rest_dim else None
    attend_to_prompts(query[..., :dim], keys, values, prompts, out, **settings, rest=second)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("window", [None, 3, 20])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_windows_and_sinks(device: torch.device, window: int | None, with_sinks: bool) -> None:
    check(device, 2, 4, 16, 16, window=window, with_sinks=with_sinks)


@pytest.mark.parametrize("shape", [(1, 5, 24, 12), (2, 1, 16, 32), (1, 80, 16, 16)])
def test_shapes(device: torch.device, shape: tuple[int, int, int, int]) -> None:
    """Groups that divide no tile, and one that is larger than a tile."""
    check(device, *shape)


def test_keys_in_two_parts(device: torch.device) -> None:
    check(device, 3, 1, 16, 12, rest_dim=8)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_narrow_types(device: torch.device, dtype: torch.dtype, tolerance: float) -> None:
    check(device, 2, 4, 16, 16, window=20, with_sinks=True, dtype=dtype, tolerance=tolerance)


def test_no_prompt_at_all(device: torch.device) -> None:
    empty = Prompts(torch.empty(0, 4, dtype=torch.int32, device=device), torch.empty(0, dtype=torch.int64))
    keys = torch.empty(1, 4, 16, device=device)
    out = torch.ones(1, 2, 16, device=device)
    attend_to_prompts(torch.ones(1, 2, 16, device=device), keys, keys, empty, out, page_size=4, scale=1.0)
    assert torch.equal(out, torch.ones_like(out))
