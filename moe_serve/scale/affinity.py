"""Which replica has computed the beginning of a prompt: remembered by the hashes of its growing prefixes.

Knows text and names of replicas; knows neither Ray nor the engine.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Generic, TypeVar

Replica = TypeVar("Replica", bound=Hashable)

BLOCK_CHARACTERS = 256
"""Prefixes grow by this. Shorter blocks find shorter matches, and take more memory: 64 KiB of text are 256 hashes."""
MOST_BLOCKS = 1024
"""Of one prompt: 256 Ki characters. What follows them tells prompts apart too late to matter."""
CAPACITY = 1 << 18
"""Prefixes remembered, about 50 MB; the least recently used one goes first."""


def prefix_hashes(text: str, owner: str = "") -> list[bytes]:
    """A hash of 8 bytes for each whole block of `text` and all before it. `owner`: whose prefixes these are.

    Prompts with k equal first blocks have k equal first hashes.
    """
    digest = hashlib.blake2b(owner.encode(), digest_size=8)
    hashes = []
    for begin in range(0, min(len(text), MOST_BLOCKS * BLOCK_CHARACTERS) - BLOCK_CHARACTERS + 1, BLOCK_CHARACTERS):
        digest.update(text[begin : begin + BLOCK_CHARACTERS].encode("utf-8", "surrogatepass"))
        hashes.append(digest.digest())
    return hashes


class Affinity(Generic[Replica]):
    """Remembers which replica got which prefixes, and ranks replicas for the next prompt."""

    def __init__(self, max_extra_load: int, capacity: int = CAPACITY) -> None:
        """`max_extra_load`: requests by which a prefix's replica may exceed the least busy one."""
        self._max_extra_load = max_extra_load
        self._capacity = capacity
        self._replicas: OrderedDict[bytes, Replica] = OrderedDict()

    def rank(self, hashes: Sequence[bytes], loads: Mapping[Replica, int]) -> list[Replica]:
        """The replicas of `loads`, the best first: the one with the longest known prefix unless it is too busy, then
        the others by load. `loads`: requests in flight by replica."""
        by_load = sorted(loads, key=loads.__getitem__)
        holder = self.holder(hashes, loads)
        if holder is None or loads[holder] > loads[by_load[0]] + self._max_extra_load:
            return by_load
        return [holder, *(replica for replica in by_load if replica != holder)]

    def holder(self, hashes: Sequence[bytes], present: Mapping[Replica, int]) -> Replica | None:
        """The present replica that got the longest prefix of these."""
        known = (self._replicas.get(hash_) for hash_ in reversed(hashes))
        return next((replica for replica in known if replica is not None and replica in present), None)

    def note(self, hashes: Sequence[bytes], replica: Replica) -> None:
        """`replica` computes this prompt now."""
        for hash_ in hashes:
            self._replicas[hash_] = replica
            self._replicas.move_to_end(hash_)
        while len(self._replicas) > self._capacity:
            self._replicas.popitem(last=False)

    def forget(self, replica: Replica) -> None:
        """It is gone, and its cache with it."""
        for hash_ in [hash_ for hash_, holder in self._replicas.items() if holder == replica]:
            del self._replicas[hash_]
