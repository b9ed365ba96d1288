"""The device-side cache: every step's state bit-equal to the reference's, and the copies what the plan says."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moe_serve_kernels.gpu.residency import (
    MOST_PAIRS,
    Copies,
    GpuResidency,
    copy_experts,
    new_residency,
    plan,
)
from tests.support.gpu_references import plan_reference

LAYERS, EXPERTS = 2, 6


def clone(state: GpuResidency) -> GpuResidency:
    changes = {f.name: getattr(state, f.name).clone() for f in dataclasses.fields(state) if f.name != "num_experts"}
    return dataclasses.replace(state, **changes)


def assert_equal(got: GpuResidency, expected: GpuResidency) -> None:
    for field in dataclasses.fields(got):
        a, b = getattr(got, field.name), getattr(expected, field.name)
        assert a == b if field.name == "num_experts" else torch.equal(a, b), f"{field.name}: {a} is not {b}"


@pytest.mark.parametrize("pools", [[(0, 4), (4, 8)], [(0, 5), (0, 5)], [(0, 2), (2, 4)]], ids=["own", "one", "few"])
def test_plans_like_the_reference(device: torch.device, pools: list[tuple[int, int]]) -> None:
    """Pools of their own, one pool for both layers, and pools with fewer slots than a step has experts."""
    state = new_residency(LAYERS, EXPERTS, 8, device)
    expected = clone(state)
    for step in range(24):
        layer = step % LAYERS
        ids = torch.rand(2, EXPERTS).topk(2).indices.to(device)
        plan(state, layer, ids, pools[layer])
        plan_reference(expected, layer, ids, pools[layer])
        assert_equal(state, expected)
        here = state.of_layer(layer)[ids.flatten().unique()]
        assert int((here < 0).sum()) == int(state.counts[1])


def test_slots_and_owners_agree(device: torch.device) -> None:
    state = new_residency(LAYERS, EXPERTS, 5, device)
    for step in range(12):
        plan(state, step % LAYERS, torch.rand(1, EXPERTS).topk(3).indices.to(device), (0, 5))
        owned = {int(owner): slot for slot, owner in enumerate(state.owner_of) if owner >= 0}
        assert owned == {key: int(slot) for key, slot in enumerate(state.slot_of) if slot >= 0}


def test_no_tokens_change_nothing_but_the_clock(device: torch.device) -> None:
    state = new_residency(LAYERS, EXPERTS, 4, device)
    plan(state, 0, torch.empty(0, 2, dtype=torch.int64, device=device), (0, 4))
    assert int(state.clock) == 1
    assert state.counts.tolist() == [0, 0]
    assert not bool(state.totals.any())
    assert bool((state.slot_of < 0).all())


def test_nobody_and_many_pairs(device: torch.device) -> None:
    """Negative ids take no slot; more pairs than a plan looks at count as the experts among them."""
    state = new_residency(LAYERS, EXPERTS, 4, device)
    expected = clone(state)
    many = torch.randint(2, 4, (MOST_PAIRS, 2))
    many[::3] = -1
    for ids in (torch.full((2, 2), -1), torch.tensor([[4, -1], [-1, 1]]), many, torch.full((MOST_PAIRS, 2), -1)):
        plan(state, 1, ids.to(device), (0, 4))
        plan_reference(expected, 1, ids.to(device), (0, 4))
        assert_equal(state, expected)
    assert state.of_layer(1).tolist() == [-1, 0, 2, 3, 1, -1]


@pytest.mark.parametrize("num_bytes", [(16,), (48, 16), (40_000, 64)])
def test_copies(device: torch.device, num_bytes: tuple[int, ...]) -> None:
    """Every part of what is wanted is copied from its address; every other slot keeps its bytes."""
    hosts = [torch.randint(0, 255, (LAYERS * EXPERTS, size), dtype=torch.uint8) for size in num_bytes]
    if device.type == "cuda":
        hosts = [host.pin_memory() for host in hosts]
    slots = [torch.full((4, size), 255, dtype=torch.uint8, device=device) for size in num_bytes]
    copies = Copies(
        torch.tensor([[row.data_ptr() for row in host] for host in hosts], device=device),
        torch.tensor([part.data_ptr() for part in slots], device=device),
        torch.tensor(num_bytes, device=device),
    )
    state = new_residency(LAYERS, EXPERTS, 4, device)
    plan(state, 1, torch.tensor([[3, 0]], device=device), (1, 4))
    copy_experts(state, copies)
    for part, host in zip(slots, hosts, strict=True):
        for expert in (0, 3):
            assert torch.equal(part[int(state.of_layer(1)[expert])].cpu(), host[EXPERTS + expert])
        assert bool((part[0] == 255).all())
        assert bool((part[3] == 255).all())
        part.fill_(7)
    plan(state, 1, torch.tensor([[3, 0]], device=device), (1, 4))
    copy_experts(state, copies)
    assert all(bool((part == 7).all()) for part in slots), "a hit was copied"
