"""GpuManagedExperts: experts in pinned host memory, some of them in slots on the GPU, which itself decides which ones.

Before each layer the GPU looks at the router's choice, gives the missing experts the slots of those used longest ago
and copies them from host memory (moe_serve_kernels.gpu.residency). The host is never asked, so a decoding step that
misses is captured in a CUDA graph like one that does not. The price: every expert has to be in pinned memory, in the
slots' layout, and the policy is LRU within each layer. ExpertCache is the counterpart that needs neither.

Shape alphabet: L layers, E experts per layer, S slots, T tokens, H hidden, K choices.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from expert_cache.gpu_managed.compute import GpuCompute
from expert_cache.gpu_managed.layout import Parts, slot_of_bank, write_biases, write_slot
from expert_cache.gpu_managed.pool import SlotPool
from expert_cache.report import CacheCounters, ExpertTotals, Residency
from expert_cache.running import LocalExperts, PaddingRows, Work, nothing
from expert_cache.storage import ExpertStore, ExpertWeights, codes_on, record_layout, write_record
from predictors.shape import MoELayer

if TYPE_CHECKING:  # needs triton, which few machines without a GPU have
    from moe_serve_kernels.gpu.coded_link import RecordLayout

CHUNK_BYTES = 1 << 30
ALIGN_BYTES = 16
"""Of every piece: what a copying kernel moves at a time."""


class GpuManagedExperts(LocalExperts[object]):
    """Experts of a cache that the GPU manages by itself."""

    def __init__(self, store: ExpertStore, compute: GpuCompute, device: torch.device) -> None:
        """Reads the whole checkpoint. All slots of the pool are divided evenly among the layers, one each at least.

        ValueError: an expert's layout that cannot be copied. RuntimeError: no pinned memory for all experts.
        """
        # Needs triton, which few machines without a GPU have.
        from moe_serve_kernels.gpu.cached_layer import CachedLayers

        pool = compute.pool.experts
        slots = shares(pool.down.num_slots, len(store.layers))
        host = _read_experts(store, compute, pinned=device.type == "cuda")
        coded = None
        if host.records and host.layout is not None:
            from moe_serve_kernels.gpu.coded_link import CodedLink

            most_at_once = min(store.num_experts, max(end - start for start, end in slots))
            coded = CodedLink(host.records, host.layout, pool, most_at_once)
        self._layers = CachedLayers(host.gate_up, host.down, pool, store.num_experts, slots, coded)
        self._slot_bytes = sum(compute.pool.layout.part_bytes())
        self._num_slots = pool.down.num_slots
        counters = DeviceCounters(len(store.layers), self._layers.state.totals, self._slot_bytes)
        super().__init__(store, compute, counters)
        self.padding = PaddingRows()

    def run(
        self, layer: MoELayer, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, meanwhile: Work = nothing
    ) -> torch.Tensor:
        """See Experts; nothing in it waits for the device, and its launches follow from shapes alone."""
        self.routes.add(ids, weights)
        meanwhile()
        assert self.padding is not None
        return self._layers.run(layer, hidden, self.padding.leave_out(ids), weights, self.compute.activation)

    def residency(self) -> Residency:
        """Which experts are in slots now; waits for the device."""
        ready = self._slot_of() >= 0
        return Residency(
            ready=ready,
            unused=np.zeros_like(ready),
            fast_tier="device",
            slow_tier="host",
            num_slots=self._num_slots,
            slot_bytes=self._slot_bytes,
            used_bytes=int(ready.sum()) * self._slot_bytes,
            link_bytes=int(self.totals().demand_bytes),
        )

    def check_integrity(self) -> None:
        """AssertionError unless table and owners agree; waits for the device."""
        table = self._slot_of().ravel()
        owners = self._layers.state.owner_of.cpu().numpy()
        owned = np.flatnonzero(owners >= 0)
        assert sorted(owners[owned]) == list(np.flatnonzero(table >= 0)), "a slot's owner is not in the table"
        assert (table[owners[owned]] == owned).all(), "an expert is not in the slot that it owns"

    def _slot_of(self) -> NDArray[np.int32]:
        """[L, E]"""
        slots: NDArray[np.int32] = self._layers.state.slot_of.view(len(self.store.layers), -1).cpu().numpy()
        return slots


class DeviceCounters(CacheCounters):
    """CacheCounters, read from the device on each access; an access waits for the device."""

    def __init__(self, num_layers: int, totals: torch.Tensor, expert_bytes: int) -> None:
        """`totals`: GpuResidency.totals [3, L]."""
        super().__init__(num_layers)
        self._totals = totals
        self._expert_bytes = expert_bytes

    def totals(self) -> ExpertTotals:
        self._read()
        return super().totals()

    def by_layer(self) -> dict[str, NDArray[np.int64] | NDArray[np.float64]]:
        self._read()
        return super().by_layer()

    def _read(self) -> None:
        self.hits[:], self.misses[:], self.evictions[:] = self._totals.cpu().numpy()
        self.demand_bytes[:] = self.misses * self._expert_bytes


def shares(num_slots: int, num_layers: int) -> list[tuple[int, int]]:
    """Each layer's slots (first, beyond the last): equal, the first layers having one more where it does not divide."""
    assert num_slots >= num_layers
    each, more = divmod(num_slots, num_layers)
    starts = [i * each + min(i, more) for i in range(num_layers + 1)]
    return list(itertools.pairwise(starts))


def host_bytes(store: ExpertStore, compute: GpuCompute) -> int:
    """Host memory that GpuManagedExperts take."""
    layout = _records(store, compute)
    return store.num_total * _bytes_of_one(_likes(compute, layout), layout)


def _bytes_of_one(likes: list[Parts], layout: RecordLayout | None) -> int:
    parts = [part.nbytes for bank in likes for part in bank.values()]
    return sum(-(-size // ALIGN_BYTES) * ALIGN_BYTES for size in (*parts, layout.num_bytes if layout else 0))


@dataclass(frozen=True, slots=True)
class HostSide:
    """Every expert in host memory, by layer * E + expert."""

    gate_up: dict[str, list[torch.Tensor]]
    """Each part as a slot holds it; the weights are left out where there are records."""
    down: dict[str, list[torch.Tensor]]
    records: list[torch.Tensor]
    """The weights in 12-bit codes, where the checkpoint has them so."""
    layout: RecordLayout | None
    """Of the records."""


def _read_experts(store: ExpertStore, compute: GpuCompute, pinned: bool) -> HostSide:
    layout = _records(store, compute)
    likes = _likes(compute, layout)
    heap = HostHeap(store.num_total * _bytes_of_one(likes, layout), pinned)
    host = HostSide({name: [] for name in likes[0]}, {name: [] for name in likes[1]}, [], layout)
    for layer in store.layers:
        for expert in range(store.num_experts):
            weights = store.weights(layer, expert)
            gate_up, down = (_take(heap, bank) for bank in likes)
            if layout is None:
                _write(weights, compute.pool, gate_up, down)
            else:
                host.records.append(heap.take(layout.num_bytes))
                write_record(weights, layout, host.records[-1])
                write_biases(weights, gate_up, down)
            for lists, parts in ((host.gate_up, gate_up), (host.down, down)):
                for name, part in parts.items():
                    lists[name].append(part)
    return host


def _records(store: ExpertStore, compute: GpuCompute) -> RecordLayout | None:
    """The layout of the weights' records, where slots are bf16 and all of a store's weights are in 12-bit codes."""
    layout = compute.pool.layout
    if (layout.format, layout.dtype) != ("plain", torch.bfloat16):
        return None
    return record_layout(store, sum(layout.part_bytes()))


def _likes(compute: GpuCompute, layout: RecordLayout | None) -> list[Parts]:
    """The parts of one slot of both banks that come as they are."""
    banks = (compute.pool.experts.gate_up, compute.pool.experts.down)
    return [
        {name: part for name, part in slot_of_bank(bank, 0).items() if layout is None or name != "data"}
        for bank in banks
    ]


def _write(weights: ExpertWeights, pool: SlotPool, gate_up: Parts, down: Parts) -> None:
    """Fill a slot's parts in host memory. Codes that have to be converted go by a slot of the pool, which has no expert
    yet: its device converts them."""
    first = slot_of_bank(pool.experts.gate_up, 0), slot_of_bank(pool.experts.down, 0)
    moved = codes_on(first[0]["data"].device, weights)
    if moved is weights:
        write_slot(weights, pool.layout, gate_up, down)
        return
    write_slot(moved, pool.layout, *first)
    for parts, made in zip((gate_up, down), first, strict=True):
        for name, part in parts.items():
            part.copy_(made[name], non_blocking=True)


def _take(heap: HostHeap, likes: Parts) -> Parts:
    """Host memory for the parts of one slot of a bank."""
    return {name: heap.take(like.nbytes).view(like.dtype).view(like.shape) for name, like in likes.items()}


class HostHeap:
    """Host memory that a GPU can read by itself, handed out piece by piece and given back as a whole.

    Pinned in chunks of a power of two, because torch's allocator rounds every pinned allocation up to one: an
    allocation per tensor would take up to twice the memory.
    """

    def __init__(self, num_bytes: int, pinned: bool) -> None:
        """`num_bytes`: what will be taken, roundings to ALIGN_BYTES included. `pinned`: a GPU reads it."""
        self._left = num_bytes
        self._pinned = pinned
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, num_bytes: int) -> torch.Tensor:
        """Uninitialised uint8 [num_bytes]. RuntimeError: the system gives no more pinned memory."""
        size = -(-num_bytes // ALIGN_BYTES) * ALIGN_BYTES
        if self._used + size > len(self._chunk):
            wanted = max(size, min(CHUNK_BYTES, self._left))
            self._chunk, self._used = torch.empty(wanted, dtype=torch.uint8, pin_memory=self._pinned), 0
        piece = self._chunk[self._used : self._used + num_bytes]
        self._used += size
        self._left -= size
        return piece
