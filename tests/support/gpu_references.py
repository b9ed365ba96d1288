"""What the GPU's kernels compute, in plain torch, and experts in the formats they read: for tests to compare with."""

from __future__ import annotations

import torch

from moe_serve_kernels.cpu.expert_mlp import Activation, activate
from moe_serve_kernels.gpu.align import Aligned, empty_aligned, max_tiles
from moe_serve_kernels.gpu.pool import DTYPE_OF, GROUP_SIZE, Bank, ExpertPool, Format, pack_int4
from moe_serve_kernels.gpu.residency import GpuResidency

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def align_reference(ids: torch.Tensor, num_experts: int, block_t: int) -> Aligned:
    """The same in torch; waits for the device."""
    flat = ids.flatten().long()
    counts = torch.bincount(flat[flat >= 0], minlength=num_experts)
    aligned = empty_aligned(ids, num_experts, max_tiles(len(flat), num_experts, block_t))
    aligned.pairs.copy_(flat.argsort(stable=True).roll(-int((flat < 0).sum())))
    aligned.ends.copy_(counts.cumsum(0))
    tiles = [
        (expert, end - count + first)
        for expert, (count, end) in enumerate(zip(counts.tolist(), aligned.ends.tolist(), strict=True))
        for first in range(0, count, block_t)
    ]
    table = torch.tensor(tiles + [(-1, 0)] * (aligned.num_tiles - len(tiles)), dtype=torch.int32).view(-1, 2)
    aligned.tile_expert.copy_(table[:, 0])
    aligned.tile_start.copy_(table[:, 1])
    return aligned


def plan_reference(state: GpuResidency, layer: int, ids: torch.Tensor, pool: tuple[int, int]) -> None:
    """The same in Python, exactly."""
    first_key = layer * state.num_experts
    now = int(state.clock) + 1
    state.clock.fill_(now)
    slots = range(*pool)
    chosen = sorted({e for e in ids.flatten().tolist() if e >= 0})
    missing = [e for e in chosen if state.slot_of[first_key + e] < 0]
    for slot in slots:
        if int(state.owner_of[slot]) - first_key in chosen:
            state.used_at[slot] = now
    copies = evicted = 0
    for expert in missing:
        victim = min(slots, key=lambda s: (int(state.used_at[s]), s))
        if state.used_at[victim] >= now:
            break
        if state.owner_of[victim] >= 0:
            state.slot_of[int(state.owner_of[victim])] = -1
            evicted += 1
        state.slot_of[first_key + expert] = state.wanted[1, copies] = victim
        state.owner_of[victim] = state.wanted[0, copies] = first_key + expert
        state.used_at[victim] = now
        copies += 1
    state.counts[0], state.counts[1] = copies, len(missing) - copies
    state.totals[:, layer] += torch.tensor([len(chosen) - len(missing), copies, evicted], device=state.totals.device)


def combine_reference(
    outputs: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, slot_of: torch.Tensor, out: torch.Tensor
) -> None:
    """The same in torch."""
    rows = outputs.view(*ids.shape, -1).to(torch.promote_types(outputs.dtype, torch.float32))
    here = ((ids >= 0) & (slot_of[ids.clamp(min=0).long()] >= 0))[..., None]
    out.copy_((torch.where(here, rows, 0) * weights[..., None]).sum(1))


def moe_layer_reference(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    slot_of: torch.Tensor,
    pool: ExpertPool,
    activation: Activation,
) -> torch.Tensor:
    """The same in torch, in float64 throughout, one pair at a time -> [T, H] float64."""
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for token, choices in enumerate(ids.tolist()):
        for choice, expert in enumerate(choices):
            slot = int(slot_of[expert]) if expert >= 0 else -1
            if slot >= 0:
                out[token] += weights[token, choice].double() * _expert(x[token].double(), slot, pool, activation)
    return out


def _expert(x: torch.Tensor, slot: int, pool: ExpertPool, activation: Activation) -> torch.Tensor:
    both = dequantize(pool.gate_up, slot) @ x
    if pool.gate_up.bias is not None:
        both = both + pool.gate_up.bias[slot].double().flatten()
    gate, up = both.chunk(2)
    result = dequantize(pool.down, slot) @ activate(activation, gate, up)
    return result if pool.down.bias is None else result + pool.down.bias[slot].double()


def quantize(weight: torch.Tensor, format: Format, group_size: int = GROUP_SIZE) -> dict[str, torch.Tensor]:
    """weight [.., outputs, inputs] of one slot -> the parts of a Bank's slot, rounded to nearest.

    int4 is asymmetric: zero and scale from a group's least and largest weight. Weights [2, I, H] count 2 * I outputs.
    """
    if format == "plain":
        return {"data": weight}
    if format != "int4":
        return _quantize_rows(weight, DTYPE_OF[format])
    outputs, inputs = weight.shape[:-1].numel(), weight.shape[-1]
    groups = weight.float().reshape(outputs, inputs // group_size, group_size)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / 15).clamp(min=1e-12)
    zero = (-low / scale).round()
    nibbles = (groups / scale[..., None] + zero[..., None]).round().clamp(0, 15).to(torch.uint8)
    return {"data": pack_int4(nibbles), "scale": scale.t().contiguous(), "zero": zero.t().contiguous()}


def _quantize_rows(weight: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    largest = LARGEST[dtype]
    scale = weight.float().abs().amax(-1).clamp(min=1e-12) / largest
    levels = weight.float() / scale[..., None]
    return {"data": (levels if dtype.is_floating_point else levels.round()).to(dtype), "scale": scale}


def unpack_int4(packed: torch.Tensor, group_size: int) -> torch.Tensor:
    """bytes [inputs/2, outputs] -> nibbles [outputs, groups, g]."""
    by_group = packed.t().reshape(packed.shape[1], -1, group_size // 2)
    return torch.cat([by_group & 15, by_group >> 4], dim=-1)


def dequantize(bank: Bank, slot: int) -> torch.Tensor:
    """One slot's weights as float64 [outputs, inputs]: what the kernels' references multiply with."""
    data = bank.data[slot]
    if bank.format == "int4":
        assert bank.scale is not None
        assert bank.zero is not None
        levels = unpack_int4(data, bank.group_size).double() - bank.zero[slot].t().double()[..., None]
        return (levels * bank.scale[slot].t().double()[..., None]).flatten(1)
    rows = data.to(torch.float64 if data.dtype != torch.float8_e4m3fn else torch.float32).double()
    rows = rows.reshape(bank.num_outputs, bank.num_inputs)
    return rows if bank.scale is None else rows * bank.scale[slot].double().reshape(-1, 1)


def fill_slot(bank: Bank, slot: int, parts: dict[str, torch.Tensor]) -> None:
    """Copy an expert's parts (of `quantize`, and "bias") into a slot; from pinned memory without waiting."""
    for name, tensor in bank.parts().items():
        tensor[slot].copy_(parts[name].reshape(tensor[slot].shape), non_blocking=True)
