"""DeviceCache: experts in pinned host memory, some of them in slots on the GPU, which itself decides which ones.

Before each layer the GPU looks at the router's choice, gives the missing experts the slots of those used longest ago
and copies them from host memory (moe_serve_kernels.gpu.residency). The host is never asked, so a decoding step that
misses is captured in a CUDA graph like one that does not. The price: every expert has to be in pinned memory, in the
slots' layout, and the policy is LRU within each layer. ExpertCache is the counterpart that needs neither.

Shape alphabet: L layers, E experts per layer, S slots, T tokens, H hidden, K choices.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from expert_cache.acquisition import Acquisition
from expert_cache.counters import CacheCounters, ExpertTotals
from expert_cache.gpu_managed.compute import GpuCompute
from expert_cache.gpu_managed.experts import DeviceExperts
from expert_cache.gpu_managed.host_heap import ALIGN_BYTES, HostHeap
from expert_cache.gpu_managed.layout import Parts, slot_of_bank, write_slot
from expert_cache.report import Residency
from expert_cache.storage.store import ExpertStore
from moe_serve_kernels.gpu.pool import Bank


class DeviceCache(DeviceExperts):
    """ExpertCache's place for those who run layers; there is nothing to acquire."""

    belady_gap_frac: float | None = None
    """Nobody on the host sees what would be needed to know."""

    def __init__(self, store: ExpertStore, compute: GpuCompute, device: torch.device) -> None:
        """Reads the whole checkpoint. All slots of the pool are divided evenly among the layers, one each at least.

        ValueError: an expert's layout that cannot be copied. RuntimeError: no pinned memory for all experts.
        """
        from moe_serve_kernels.gpu.cached_layer import (
            CachedLayers,
        )  # needs triton, which few machines without a GPU have

        super().__init__(compute)
        self.store = store
        self._device = device
        self._index = {layer: i for i, layer in enumerate(store.layers)}
        pool = compute.pool.experts
        gate_up, down = _read_experts(store, compute, pinned=device.type == "cuda")
        slots = shares(pool.down.num_slots, len(store.layers))
        self._layers = CachedLayers(gate_up, down, pool, store.num_experts, slots)
        self.counters: CacheCounters = DeviceCounters(len(store.layers), self._layers.state.totals, self.slot_bytes)

    def _run(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self._layers.run(self._index[layer], hidden, ids, weights, self.compute.activation)

    @property
    def slot_bytes(self) -> int:
        return sum(self.compute.pool.layout.part_bytes())

    @property
    def shadow_hits(self) -> dict[str, int]:
        """The host does not see who is chosen."""
        return {}

    def residency(self) -> Residency:
        """What is in slots at this moment; waits for the device."""
        ready = self._slot_of() >= 0
        num_slots = self.compute.pool.experts.down.num_slots
        return Residency(
            ready=ready,
            unused=np.zeros_like(ready),
            fast_tier="device",
            slow_tier="host",
            num_slots=num_slots,
            slot_bytes=self.slot_bytes,
            used_bytes=int(ready.sum()) * self.slot_bytes,
            link_bytes=int(self.counters.totals().demand_bytes),
        )

    def check_integrity(self) -> None:
        """AssertionError unless table and owners agree; waits for the device."""
        table = self._slot_of().ravel()
        owners = self._layers.state.owner_of.cpu().numpy()
        owned = np.flatnonzero(owners >= 0)
        assert sorted(owners[owned]) == list(np.flatnonzero(table >= 0)), "a slot's owner is not in the table"
        assert (table[owners[owned]] == owned).all(), "an expert is not in the slot that it owns"

    def close(self) -> None:
        """Nothing to stop."""

    def _slot_of(self) -> NDArray[np.int32]:
        """[L, E]"""
        slots: NDArray[np.int32] = self._layers.state.slot_of.view(len(self.store.layers), -1).cpu().numpy()
        return slots

    # ---- what only caches on the host have -------------------------------------------------------

    def acquire(self, layer: int, experts: Sequence[int], counts: Sequence[int]) -> Acquisition:
        raise AssertionError("the GPU gets its experts by itself")

    def wait(self, wanted: Acquisition) -> None:
        raise AssertionError("the GPU gets its experts by itself")

    def release(self, wanted: Acquisition, expert: int) -> None:
        raise AssertionError("the GPU gets its experts by itself")

    def abandon(self, wanted: Acquisition) -> None:
        raise AssertionError("the GPU gets its experts by itself")

    def prefetch(self, layer: int, experts: Sequence[int], urgencies: Sequence[float]) -> None:
        raise AssertionError("the GPU gets its experts by itself")


class DeviceCounters(CacheCounters):
    """CacheCounters that are read from the device when somebody wants to know; that waits for it."""

    def __init__(self, num_layers: int, totals: torch.Tensor, expert_bytes: int) -> None:
        """`totals`: Residency.totals [3, L]."""
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
    """Host memory that a DeviceCache takes."""
    one = sum(-(-size // ALIGN_BYTES) * ALIGN_BYTES for size in compute.pool.layout.part_bytes())
    return one * store.num_total


def _read_experts(
    store: ExpertStore, compute: GpuCompute, pinned: bool
) -> tuple[dict[str, list[torch.Tensor]], dict[str, list[torch.Tensor]]]:
    """Every expert as a slot would hold it, in host memory: of both banks each part, by layer * E + expert."""
    heap = HostHeap(host_bytes(store, compute), pinned)
    pool = compute.pool.experts
    gate_ups: dict[str, list[torch.Tensor]] = {name: [] for name in pool.gate_up.parts()}
    downs: dict[str, list[torch.Tensor]] = {name: [] for name in pool.down.parts()}
    for layer in store.layers:
        for expert in range(store.num_experts):
            gate_up, down = _take(heap, pool.gate_up), _take(heap, pool.down)
            write_slot(store.weights(layer, expert), compute.pool.layout, gate_up, down)
            for lists, parts in ((gate_ups, gate_up), (downs, down)):
                for name, part in parts.items():
                    lists[name].append(part)
    return gate_ups, downs


def _take(heap: HostHeap, bank: Bank) -> Parts:
    """Host memory for one slot of a bank."""
    likes = slot_of_bank(bank, 0)
    return {name: heap.take(like.nbytes).view(like.dtype).view(like.shape) for name, like in likes.items()}
