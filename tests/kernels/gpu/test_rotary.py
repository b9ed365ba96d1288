"""Norms of heads, rotation and the writes to pages, against the same in float64."""

from __future__ import annotations

import pytest
import torch

from moe_serve_kernels.cpu.decoder import Rotary
from moe_serve_kernels.gpu.rotary import HeadNorms, Turns, rotate_heads, rotate_latents

TOKENS, HEADS, KV_HEADS, DIM, VALUE_DIM, SLOTS = 3, 4, 2, 24, 12, 40
EPS = 1e-6
KINDS: list[Rotary] = ["halves", "neighbours", "neighbours_to_halves"]


def turns_of(kind: Rotary, rotary: int, device: torch.device) -> Turns:
    angles = torch.arange(9)[:, None] * torch.rand(rotary // 2)
    positions = torch.tensor([7, 0, 3])
    return Turns(angles.cos().to(device), angles.sin().to(device), positions.to(device), kind)


def rotated(x: torch.Tensor, turns: Turns) -> torch.Tensor:
    """x [T, heads, D] with its first values rotated, as complex numbers."""
    rotary = 2 * turns.cos.shape[1]
    own = x[..., :rotary].double()
    if turns.kind == "halves":
        real, imaginary = own.chunk(2, -1)
    else:
        real, imaginary = own[..., 0::2], own[..., 1::2]
    turn = torch.complex(turns.cos.double(), turns.sin.double())[turns.positions][:, None]
    product = torch.complex(real, imaginary) * turn
    parts = [product.real, product.imag]
    done = torch.stack(parts, -1).flatten(-2) if turns.kind == "neighbours" else torch.cat(parts, -1)
    return torch.cat([done, x[..., rotary:].double()], -1)


def normed(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """x [T, heads, D]; a weight longer than D is one norm over all heads."""
    if weight is None:
        return x.double()
    rows = x.double() if weight.numel() == x.shape[-1] else x.double().flatten(1)
    done = rows / (rows.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    return done.view(x.shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norms", ["none", "of each head", "of all heads"])
@pytest.mark.parametrize("rotary", [DIM, 16])
def test_heads(device: torch.device, kind: Rotary, norms: str, rotary: int) -> None:
    qkv = torch.randn(TOKENS, HEADS * DIM + KV_HEADS * (DIM + VALUE_DIM), device=device)
    widths = {"none": None, "of each head": (DIM, DIM), "of all heads": (HEADS * DIM, KV_HEADS * DIM)}[norms]
    weights = [None, None] if widths is None else [torch.randn(width, device=device) for width in widths]
    turns = turns_of(kind, rotary, device)
    keys = torch.full((KV_HEADS, SLOTS, DIM), 7.0, device=device)
    values = torch.full((KV_HEADS, SLOTS, VALUE_DIM), 7.0, device=device)
    slots = torch.tensor([33, 2, 17], device=device)
    query = rotate_heads(qkv, turns, HeadNorms(weights[0], weights[1], EPS), slots, keys, values)
    q, k, v = qkv.split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * VALUE_DIM], 1)
    expected_query = rotated(normed(q.view(TOKENS, HEADS, DIM), weights[0]), turns)
    expected_keys = rotated(normed(k.view(TOKENS, KV_HEADS, DIM), weights[1]), turns)
    torch.testing.assert_close(query.double(), expected_query, rtol=0, atol=2e-5)
    torch.testing.assert_close(keys[:, slots].double(), expected_keys.transpose(0, 1), rtol=0, atol=2e-5)
    assert torch.equal(values[:, slots], v.view(TOKENS, KV_HEADS, VALUE_DIM).transpose(0, 1))
    assert int((keys == 7).sum()) == KV_HEADS * (SLOTS - TOKENS) * DIM


@pytest.mark.parametrize("kind", KINDS)
def test_latents(device: torch.device, kind: Rotary) -> None:
    plain, rank, rotary = 10, 20, 8
    product = torch.randn(TOKENS, HEADS * (plain + rotary) + rank + rotary, device=device)
    query = product[:, : HEADS * (plain + rotary)].unflatten(1, (HEADS, plain + rotary))
    latents = product[:, HEADS * (plain + rotary) :]
    turns, norm = turns_of(kind, rotary, device), torch.randn(rank, device=device)
    rows = torch.full((1, SLOTS, rank + rotary), 7.0, device=device)
    slots = torch.tensor([33, 2, 17], device=device)
    wide = torch.zeros(TOKENS, HEADS, rank + rotary, device=device)
    rotate_latents(query, latents, turns, norm, EPS, slots, rows, wide[..., rank:])
    torch.testing.assert_close(wide[..., rank:].double(), rotated(query[..., plain:], turns), rtol=0, atol=2e-6)
    assert not wide[..., :rank].any()
    expected = torch.cat(
        [normed(latents[:, None, :rank], norm), rotated(latents[:, None, rank:], turns)],
        -1,
    )
    torch.testing.assert_close(rows[0, slots].double(), expected[:, 0], rtol=0, atol=2e-5)
    assert int((rows == 7).sum()) == (SLOTS - TOKENS) * (rank + rotary)
