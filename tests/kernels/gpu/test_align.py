"""Sorting pairs by expert and cutting them into tiles, against the torch reference, exactly."""

from __future__ import annotations

import pytest
import torch

from moe_serve_kernels.gpu import align as module
from moe_serve_kernels.gpu.align import align
from tests.support.gpu_references import align_reference

from .cases import make_ids


def check(ids: torch.Tensor, num_experts: int, block_t: int) -> None:
    got, expected = align(ids, num_experts, block_t), align_reference(ids, num_experts, block_t)
    chosen = int((ids >= 0).sum())
    torch.testing.assert_close(got.pairs[:chosen], expected.pairs[:chosen], rtol=0, atol=0)
    for name in ("ends", "tile_expert", "tile_start"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("routing", ["random", "one", "all"])
@pytest.mark.parametrize(("num_tokens", "top_k", "num_experts"), [(1, 1, 1), (1, 2, 8), (7, 2, 5), (33, 3, 40)])
@pytest.mark.parametrize("block_t", [1, 16])
def test_one_block(
    device: torch.device, num_tokens: int, top_k: int, num_experts: int, routing: str, block_t: int
) -> None:
    check(make_ids(num_tokens, top_k, num_experts, routing).to(device), num_experts, block_t)


@pytest.mark.parametrize("routing", ["random", "one", "all"])
def test_many_blocks(device: torch.device, routing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ONE_BLOCK_PAIRS", 0)
    monkeypatch.setattr(module, "BLOCK_PAIRS", 32)
    check(make_ids(70, 3, 6, routing).to(device), 6, 16)


def test_more_blocks_than_the_sum_takes_at_once(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ONE_BLOCK_PAIRS", 0)
    monkeypatch.setattr(module, "BLOCK_PAIRS", 32)
    check(make_ids(600, 2, 4, "random").to(device), 4, 64)


@pytest.mark.parametrize("one_block_pairs", [512, 0], ids=["one block", "many blocks"])
def test_nobodys_choices_are_left_out(
    device: torch.device, one_block_pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ONE_BLOCK_PAIRS", one_block_pairs)
    monkeypatch.setattr(module, "BLOCK_PAIRS", 32)
    ids = make_ids(40, 2, 5, "random")
    ids[[0, 7, 39]] = -1
    ids[12, 1] = -1
    check(ids.to(device), 5, 16)
    check(torch.full((3, 2), -1, device=device), 5, 16)


def test_no_tokens(device: torch.device) -> None:
    check(torch.empty(0, 2, dtype=torch.int64, device=device), 4, 16)


def test_int32_ids(device: torch.device) -> None:
    check(make_ids(9, 2, 4, "random").to(torch.int32).to(device), 4, 16)
