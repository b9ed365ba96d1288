"""SlotTable: who owns which slot, who is pinned, and who would be evicted next.

Plain bookkeeping on one thread: no reading, no memory, no waiting. A slot is free, taken (its expert
is on the way) or ready.

Shape alphabet: L MoE layers, E experts per layer, S slots.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from expert_cache.policies.policy import Policy
from expert_cache.simulation.capacity import Capacity
from predictors.shape import Key, MoELayer


class SlotTable:
    """Slots 0..num_slots-1. `allowed` and `num_transit` limit how many are owned at a time."""

    def __init__(
        self, num_layers: int, num_experts: int, num_slots: int, allowed: Capacity, num_transit: int, policy: Policy
    ) -> None:
        """`num_slots` exist; the pools may own what `allowed` says, and `num_transit` more are in transit."""
        assert allowed.total + num_transit <= num_slots
        shape = (num_layers, num_experts)
        self.allowed = allowed
        self.num_transit = num_transit
        self.slot_of: NDArray[np.int32] = np.full(shape, -1, np.int32)
        """[L, E] the slot of an expert that is ready to run; -1: absent or still on its way."""
        self.pins = np.zeros(shape, np.int16)
        """[L, E] how many users need an expert to stay."""
        self.not_asked_yet = np.zeros(shape, np.bool_)
        """[L, E] prefetched and not asked for yet."""
        self.in_transit = np.zeros(shape, np.bool_)
        """[L, E] in a slot that belongs to no pool: whether the expert stays is decided after its use."""
        self.taken: dict[Key, int] = {}
        """Slots of experts on their way."""
        self._policy = policy
        self._num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._used = np.zeros(num_layers, np.int64)

    def has_room(self, key: Key) -> bool:
        """The pool of this expert's layer has a free slot."""
        if self.allowed.quotas is None:
            return int(self._used.sum()) < self.allowed.total
        return bool(self._used[key[0]] < self.allowed.quotas[key[0]])

    @property
    def has_transit(self) -> bool:
        """There is a slot in which an expert can be brought without evicting another."""
        return int(self.in_transit.sum()) < self.num_transit

    def take(self, key: Key, transit: bool = False) -> None:
        """Take a slot for an expert on its way, of its layer's pool or in transit; there must be one."""
        assert self.has_transit if transit else self.has_room(key)
        assert self.slot_of[key] < 0
        assert key not in self.taken
        self.taken[key] = self._free.pop()
        if transit:
            self.in_transit[key] = True
        else:
            self._used[key[0]] += 1

    def admit(self, key: Key) -> None:
        """An expert in transit stays: its slot now counts for its layer's pool, which has room."""
        assert self.in_transit[key]
        assert self.has_room(key)
        self.in_transit[key] = False
        self._used[key[0]] += 1

    def make_ready(self, key: Key) -> int:
        """The expert has arrived in its slot; returns which."""
        slot = self.slot_of[key] = self.taken.pop(key)
        return int(slot)

    def untake(self, key: Key) -> None:
        """The expert will not arrive: its slot is free again."""
        self._give_back(key, self.taken.pop(key))

    def evict(self, key: Key) -> int:
        """Free a ready, unpinned expert's slot; returns which."""
        slot = int(self.slot_of[key])
        assert slot >= 0, "an absent expert was to be evicted"
        assert self.pins[key] == 0, "an expert in use was to be evicted"
        self.slot_of[key] = -1
        self.not_asked_yet[key] = False
        self._give_back(key, slot)
        return slot

    def victim(self, layer: MoELayer, spare_unasked: bool) -> tuple[Key, float] | None:
        """The ready, unpinned expert that the policy values least, of those in the pool of `layer`, and its value.

        `spare_unasked`: not one that was prefetched and has not been used yet.
        """
        one = self.allowed.quotas is not None
        rows = layer if one else slice(None)
        allowed = (self.slot_of[rows] >= 0) & (self.pins[rows] == 0) & ~self.in_transit[rows]
        if spare_unasked:
            allowed &= ~self.not_asked_yet[rows]
        if not allowed.any():
            return None
        values = self._policy.keep_values(layer) if one else self._policy.keep_values_all()
        least = int(np.where(allowed, values, np.inf).argmin())
        first, expert = (layer, least) if one else divmod(least, allowed.shape[1])
        return (MoELayer(first), expert), float(values.flat[least])

    def value(self, key: Key) -> float:
        """What the policy gives for an expert, comparable with those of its pool."""
        if self.allowed.quotas is not None:
            return float(self._policy.keep_values(key[0])[key[1]])
        return float(self._policy.keep_values_all()[key])

    def over_capacity(self) -> list[MoELayer]:
        """A layer of each pool that holds more than it may, after `allowed` was replaced."""
        if self.allowed.quotas is None:
            return [MoELayer(0)] if self._used.sum() > self.allowed.total else []
        return [MoELayer(i) for i, quota in enumerate(self.allowed.quotas) if self._used[i] > quota]

    def same_pool(self, layer: MoELayer, other: MoELayer) -> bool:
        """Two layers compete for slots."""
        return self.allowed.quotas is None or layer == other

    @property
    def num_owned(self) -> int:
        """Slots that are taken or ready."""
        return int(self._used.sum() + self.in_transit.sum())

    def check_integrity(self) -> None:
        """Prove the invariants; AssertionError says which one broke."""
        ready = {(int(i), int(e)): int(self.slot_of[i, e]) for i, e in np.argwhere(self.slot_of >= 0)}
        assert not set(ready) & set(self.taken), "an expert is both ready and on its way"
        owned = [*ready.values(), *self.taken.values()]
        assert sorted(owned + self._free) == list(range(self._num_slots)), "a slot is lost or owned twice"
        used = np.zeros_like(self._used)
        for key in [*ready, *self.taken]:
            used[key[0]] += not self.in_transit[key]
        assert (used == self._used).all(), "slot counts drifted"
        assert not self.over_capacity(), "a pool is over its capacity"
        assert self.in_transit.sum() <= self.num_transit, "too many experts in transit"
        travellers = {(int(i), int(e)) for i, e in np.argwhere(self.in_transit)}
        assert travellers <= ready.keys() | self.taken.keys(), "an absent expert is in transit"
        assert (self.pins >= 0).all(), "unpinned too often"
        assert not (self.not_asked_yet & (self.slot_of < 0)).any(), "an absent expert is marked as prefetched"

    def _give_back(self, key: Key, slot: int) -> None:
        self._free.append(slot)
        if self.in_transit[key]:
            self.in_transit[key] = False
        else:
            self._used[key[0]] -= 1
