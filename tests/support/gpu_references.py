"""What the GPU's kernels compute, in plain torch, and experts in the formats they read: for tests to compare with."""

from __future__ import annotations

import torch

from moe_serve_kernels.cpu.expert_mlp import Activation, activate
from moe_serve_kernels.gpu.align import Aligned, empty_aligned, max_tiles
from moe_serve_kernels.gpu.pool import Bank, ExpertPool, pack
from moe_serve_kernels.gpu.residency import GpuResidency
from moe_serve_kernels.gpu.weight_format import GROUP_SIZE, Format, weight_format
from moe_serve_kernels.quantized import FP4_VALUES

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
    form = weight_format(format)
    group_size = form.group_size(group_size)
    if format == "plain":
        return {"data": weight}
    if format == "int4":
        return _quantize_int4(weight, group_size)
    if form.is_packed:
        return _quantize_fp4(weight, format, group_size)
    assert form.dtype is not None
    if form.scale_of == "output":
        return _quantize_rows(weight, form.dtype)
    return _quantize_blocks(weight, form.dtype, form.rows_per_scale, group_size)


def _quantize_int4(weight: torch.Tensor, group_size: int) -> dict[str, torch.Tensor]:
    outputs, inputs = weight.shape[:-1].numel(), weight.shape[-1]
    groups = weight.float().reshape(outputs, inputs // group_size, group_size)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / 15).clamp(min=1e-12)
    zero = (-low / scale).round()
    nibbles = (groups / scale[..., None] + zero[..., None]).round().clamp(0, 15).to(torch.uint8)
    return {"data": pack(*nibbles.chunk(2, -1)), "scale": scale.t().contiguous(), "zero": zero.t().contiguous()}


def _quantize_fp4(weight: torch.Tensor, format: Format, group_size: int) -> dict[str, torch.Tensor]:
    """mxfp4: the power of two that keeps the largest of a group in range. nvfp4: its e4m3 scale, and an odd factor of
    each output."""
    outputs, inputs = weight.shape[:-1].numel(), weight.shape[-1]
    groups = weight.float().reshape(outputs, inputs // group_size, group_size)
    wanted = groups.abs().amax(-1) / 6
    if format == "mxfp4":
        bytes_of = (wanted.clamp(min=2**-40).log2().ceil() + 127).to(torch.uint8)
        scale, parts = (bytes_of.float() - 127).exp2(), {}
    else:
        factor = torch.linspace(0.003, 0.005, outputs, device=weight.device)
        bytes_of = (wanted / factor[:, None]).to(torch.float8_e4m3fn)
        scale, parts = bytes_of.float() * factor[:, None], {"factor": factor}
        bytes_of = bytes_of.view(torch.uint8)
    values = torch.tensor(FP4_VALUES, device=weight.device)
    scaled = torch.where(scale[..., None] > 0, groups / scale[..., None], 0)
    nibbles = (scaled[..., None] - values).abs().argmin(-1).to(torch.uint8)
    data = pack(nibbles[:, ::2], nibbles[:, 1::2])
    return {"data": data, "scale": bytes_of.t().contiguous(), **parts}


def _quantize_rows(weight: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    largest = LARGEST[dtype]
    scale = weight.float().abs().amax(-1).clamp(min=1e-12) / largest
    return {"data": _levels(weight.float() / scale[..., None], dtype), "scale": scale}


def _quantize_blocks(weight: torch.Tensor, dtype: torch.dtype, rows: int, columns: int) -> dict[str, torch.Tensor]:
    """Blocks of `rows` outputs and `columns` inputs; those at the edges are smaller."""
    size = [-(-weight.shape[-2] // rows), -(-weight.shape[-1] // columns)]
    padded = torch.zeros(*weight.shape[:-2], size[0] * rows, size[1] * columns, device=weight.device)
    padded[..., : weight.shape[-2], : weight.shape[-1]] = weight
    scale = padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows)).abs().amax((-3, -1)).clamp(min=1e-12)
    scale = scale / LARGEST[dtype]
    levels = weight.float() / _spread(scale, rows, columns, weight.shape)
    return {"data": _levels(levels, dtype), "scale": scale.mT.contiguous()}


def _spread(scale: torch.Tensor, rows: int, columns: int, shape: torch.Size) -> torch.Tensor:
    """A scale of each block -> one of each weight."""
    spread = scale.repeat_interleave(rows, -2).repeat_interleave(columns, -1)
    return spread[..., : shape[-2], : shape[-1]]


def _levels(levels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (levels if dtype.is_floating_point else levels.round()).to(dtype)


def unpack(packed: torch.Tensor, half: int) -> torch.Tensor:
    """bytes [inputs/2, outputs] -> nibbles [outputs, inputs]."""
    by_step = packed.t().reshape(packed.shape[1], -1, half)
    return torch.cat([by_step & 15, by_step >> 4], dim=-1).flatten(1)


def dequantize(bank: Bank, slot: int) -> torch.Tensor:
    """One slot's weights as float64 [outputs, inputs]: what the kernels' references multiply with."""
    weights = _packed_weights(bank, slot) if bank.form.is_packed else _row_weights(bank, slot)
    return weights if bank.factor is None else weights * bank.factor[slot].double().reshape(-1, 1)


def _packed_weights(bank: Bank, slot: int) -> torch.Tensor:
    assert bank.scale is not None
    nibbles = unpack(bank.data[slot], bank.form.half(bank.group_size))
    scale = bank.scale[slot]
    if bank.format == "int4":
        assert bank.zero is not None
        codes = nibbles.double() - bank.zero[slot].double().t().repeat_interleave(bank.group_size, 1)
    else:
        codes = torch.tensor(FP4_VALUES, dtype=torch.float64, device=nibbles.device)[nibbles.long()]
        scale = (scale.double() - 127).exp2() if bank.format == "mxfp4" else scale.view(torch.float8_e4m3fn).float()
    return codes * scale.double().t().repeat_interleave(bank.group_size, 1)


def _row_weights(bank: Bank, slot: int) -> torch.Tensor:
    data = bank.data[slot]
    rows = data.to(torch.float64 if data.dtype != torch.float8_e4m3fn else torch.float32).double()
    if bank.form.scale_of == "group":
        assert bank.scale is not None
        rows = rows * _spread(bank.scale[slot].double().mT, bank.form.rows_per_scale, bank.group_size, rows.shape)
    rows = rows.reshape(bank.num_outputs, bank.num_inputs)
    has_own = bank.form.scale_of == "output" and bank.scale is not None
    return rows * bank.scale[slot].double().reshape(-1, 1) if has_own and bank.scale is not None else rows


def fill_slot(bank: Bank, slot: int, parts: dict[str, torch.Tensor]) -> None:
    """Copy an expert's parts (of `quantize`, and "bias") into a slot; from pinned memory without waiting."""
    for name, tensor in bank.parts().items():
        tensor[slot].copy_(parts[name].reshape(tensor[slot].shape), non_blocking=True)
