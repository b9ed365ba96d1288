"""Which experts are in which slots, decided on the device: hits stamped, misses given slots, copies made, no waiting.

Before a MoE layer runs, one program of `plan` looks at the router's choice: every chosen expert that has a slot gets
the layer's time stamp; every other takes the slot of the layer's pool that was used longest ago, and is put on a list.
`copy_experts` then reads the list from device memory and copies from the host's pinned memory straight into the slots
(unified virtual addressing: the GPU reads host memory by itself). Both, and the layer after them, can be captured into
one graph (vLLM's expert pool, FreeToken). If the pool has fewer slots than the step has experts, the last ones get no
slot (-1), and the caller runs them later.

All state is on the device: slot_of [L*E], owner_of [S] (layer * E + expert; -1: empty), used_at [S], clock [1].

Shape alphabet: L layers, E experts per layer, S slots, T tokens, K choices, P = T * K pairs of the step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

MOST_COMPARED = 8192
"""Comparisons of pairs with slots or experts at a time: more do not fit in registers."""
MOST_PAIRS = 1024
"""More are reduced to the experts among them beforehand: the one program of a plan looks at a few pairs at a time."""
COPY_PROGRAMS = 32
"""Enough to fill a PCIe 5 link, few enough to leave the GPU to others."""
COPY_WORDS = 2048
"""8-byte words that one program copies at a time."""
NEVER_FREE = tl.constexpr(1 << 62)
"""The time stamp of an entry that is no slot."""


@dataclass(frozen=True, slots=True, eq=False)
class GpuResidency:
    """Which expert is in which slot. Everything is on the device; nothing here reads it back."""

    num_experts: int
    slot_of: torch.Tensor
    """[L*E] int32; -1: in no slot."""
    owner_of: torch.Tensor
    """[S] int32"""
    used_at: torch.Tensor
    """[S] int64: clock of the last use; -1: never."""
    clock: torch.Tensor
    """[1] int64: one more with every plan, thousands of times a second."""
    wanted: torch.Tensor
    """[2, E] int32: layer * E + expert and slot of each copy of the last plan."""
    counts: torch.Tensor
    """[2] int32: copies of the last plan, and experts it found no slot for."""
    totals: torch.Tensor
    """[3, L] int64, since the beginning: chosen experts that had a slot, copies, and experts that lost theirs."""

    def of_layer(self, layer: int) -> torch.Tensor:
        """slot_of [E] of one layer, a view that stays right."""
        return self.slot_of[layer * self.num_experts : (layer + 1) * self.num_experts]


def new_residency(num_layers: int, num_experts: int, num_slots: int, device: torch.device) -> GpuResidency:
    """Empty slots."""

    def full(*shape: int, value: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.full(shape, value, dtype=dtype, device=device)

    return GpuResidency(
        num_experts,
        full(num_layers * num_experts, value=-1),
        full(num_slots, value=-1),
        full(num_slots, value=-1, dtype=torch.int64),
        full(1, value=0, dtype=torch.int64),
        full(2, num_experts, value=-1),
        full(2, value=0),
        full(3, num_layers, value=0, dtype=torch.int64),
    )


def plan(state: GpuResidency, layer: int, ids: torch.Tensor, pool: tuple[int, int]) -> None:
    """Make room for the experts in `ids` [T, K] of a layer, among the slots pool[0] .. pool[1] - 1.

    Of slots used equally long ago the first is taken; of the experts, the smaller first. Negative ids are padding.
    """
    if ids.numel() > MOST_PAIRS:
        ids = _distinct(ids, state.num_experts)
    assert ids.is_contiguous()
    block_e = triton.next_power_of_2(state.num_experts)
    block_s = triton.next_power_of_2(pool[1] - pool[0])
    plan_kernel[(1,)](
        ids,
        state.slot_of,
        state.owner_of,
        state.used_at,
        state.clock,
        state.wanted,
        state.counts,
        state.totals[:, layer],
        ids.numel(),
        state.totals.shape[1],
        layer * state.num_experts,
        state.num_experts,
        pool[0],
        pool[1] - pool[0],
        BLOCK_E=block_e,
        BLOCK_S=block_s,
        CHUNK=max(1, min(32, MOST_COMPARED // max(block_e, block_s))),
        num_warps=8,
        enable_fp_fusion=True,
    )


def _distinct(ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[E]: each expert that is in `ids`, -1 in the places of the others."""
    is_chosen = torch.zeros(num_experts + 1, dtype=torch.bool, device=ids.device)
    is_chosen.index_fill_(0, ids.flatten().long(), True)  # -1 falls on the one beyond the experts
    expert = torch.arange(num_experts, device=ids.device)
    return torch.where(is_chosen[:num_experts], expert, -1)


@dataclass(frozen=True, slots=True, eq=False)
class Copies:
    """Where the parts of experts come from and go to. All int64, on the device."""

    sources: torch.Tensor
    """[R, L*E] address of each part of each expert, in pinned memory."""
    targets: torch.Tensor
    """[R] address of each part of slot 0, or of place 0 of a stage."""
    num_bytes: torch.Tensor
    """[R] of one expert's part: a multiple of 16, as are the addresses."""


def copy_experts(state: GpuResidency, copies: Copies, to_stage: bool = False) -> None:
    """Copy what the last plan wants, all parts in one launch: into slots, or into places 0, 1, ... of a stage."""
    num_parts, num_keys = copies.sources.shape
    copy_kernel[(COPY_PROGRAMS, num_parts)](
        copies.sources,
        copies.targets,
        copies.num_bytes,
        state.wanted,
        state.counts,
        num_keys,
        state.num_experts,
        TO_STAGE=to_stage,
        BLOCK=COPY_WORDS,
        num_warps=8,
        enable_fp_fusion=True,
    )


@triton.jit
def plan_kernel(
    ids_ptr,
    slot_of_ptr,
    owner_of_ptr,
    used_at_ptr,
    clock_ptr,
    wanted_ptr,
    counts_ptr,
    totals_ptr,
    num_pairs,
    num_layers,
    first_key,
    num_experts,
    first_slot,
    num_slots,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid (1,). Works on registers and writes each place once, so that no thread reads what another one writes."""
    expert = tl.arange(0, BLOCK_E)
    slot = tl.arange(0, BLOCK_S)
    is_slot = slot < num_slots
    now = tl.load(clock_ptr) + 1
    owner = tl.load(owner_of_ptr + first_slot + slot, mask=is_slot, other=-1)
    used = tl.load(used_at_ptr + first_slot + slot, mask=is_slot, other=NEVER_FREE)
    here = tl.load(slot_of_ptr + first_key + expert, mask=expert < num_experts, other=0)
    chosen = tl.zeros([BLOCK_E], tl.int32)
    hit = tl.zeros([BLOCK_S], tl.int32)
    for first in range(0, num_pairs, CHUNK):
        at = first + tl.arange(0, CHUNK)
        own = tl.load(ids_ptr + at, mask=at < num_pairs, other=-2).to(tl.int32)
        chosen = tl.maximum(chosen, tl.max((own[None, :] == expert[:, None]).to(tl.int32), 1))
        key = tl.where(own >= 0, own + first_key, -2)
        hit = tl.maximum(hit, tl.max((key[None, :] == owner[:, None]).to(tl.int32), 1))
    used = tl.where(hit == 1, now, used)
    missing = tl.where((chosen == 1) & (here < 0), 1, 0)
    num_missing = tl.sum(missing, 0)
    num_copies = 0
    num_evicted = 0
    for _ in range(0, num_missing):
        oldest = tl.min(used, 0)
        if oldest < now:
            victim = tl.min(tl.where(used == oldest, slot, BLOCK_S), 0)
            new = tl.min(tl.where(missing == 1, expert, BLOCK_E), 0)
            old_key = tl.max(tl.where(slot == victim, owner, -1), 0)
            tl.store(slot_of_ptr + old_key, -1, mask=old_key >= 0)
            num_evicted += (old_key >= 0).to(tl.int32)
            tl.store(slot_of_ptr + first_key + new, first_slot + victim)
            tl.store(wanted_ptr + num_copies, first_key + new)
            tl.store(wanted_ptr + num_experts + num_copies, first_slot + victim)
            owner = tl.where(slot == victim, first_key + new, owner)
            used = tl.where(slot == victim, now, used)
            missing = tl.where(expert == new, 0, missing)
            num_copies += 1
    tl.store(owner_of_ptr + first_slot + slot, owner, mask=is_slot)
    tl.store(used_at_ptr + first_slot + slot, used, mask=is_slot)
    tl.store(clock_ptr, now)
    tl.store(counts_ptr, num_copies)
    tl.store(counts_ptr + 1, num_missing - num_copies)
    _add(totals_ptr, tl.sum(chosen, 0) - num_missing)
    _add(totals_ptr + num_layers, num_copies)
    _add(totals_ptr + 2 * num_layers, num_evicted)


@triton.jit
def _add(ptr, value):
    tl.store(ptr, tl.load(ptr) + value)


@triton.jit
def copy_kernel(
    sources_ptr,
    targets_ptr,
    bytes_ptr,
    wanted_ptr,
    counts_ptr,
    num_keys,
    num_experts,
    TO_STAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (programs, R): program i takes every `programs`-th block, from block i on, of one part of every expert."""
    part = tl.program_id(1)
    num_bytes = tl.load(bytes_ptr + part)
    num_words = tl.multiple_of(num_bytes // 8, 2)
    step = tl.num_programs(0) * BLOCK
    for i in range(0, tl.load(counts_ptr)):
        source = tl.load(sources_ptr + part * num_keys + tl.load(wanted_ptr + i))
        place = i if TO_STAGE else tl.load(wanted_ptr + num_experts + i)
        target = tl.load(targets_ptr + part) + place * num_bytes
        source = tl.multiple_of(source.to(tl.pointer_type(tl.int64)), 16)
        target = tl.multiple_of(target.to(tl.pointer_type(tl.int64)), 16)
        for first in range(tl.program_id(0) * BLOCK, num_words, step):
            at = first + tl.arange(0, BLOCK)
            tl.store(target + at, tl.load(source + at, mask=at < num_words), mask=at < num_words)
