"""The cache as a state machine: any order of acquiring, prefetching, cancelling, resizing, evicting and failing.

After every step the bookkeeping is proved, and every ready expert's bytes are compared with the file:
a slot that was reused too early, or filled by a cancelled read, would show.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from expert_cache.host_managed.acquisition import Acquisition
from expert_cache.host_managed.cache import ExpertCache
from expert_cache.policies import find_policy, policy_names
from expert_cache.simulation.capacity import Capacity
from expert_cache.storage import fetch
from expert_cache.storage.arena import HostArena
from expert_cache.storage.direct_io import DirectFile
from expert_cache.storage.errors import ExpertReadError
from expert_cache.storage.fetch import Fetcher
from expert_cache.storage.store import ExpertWeights
from predictors.shape import MoELayer

from .caches import SteppedFetcher
from .stores import FIRST, LAYERS, SECOND, E, plain, split_store

SLOTS = st.one_of(
    st.integers(1, 10).map(Capacity.shared),
    st.tuples(st.integers(1, 5), st.integers(1, 5)).map(Capacity.per_layer),
)
EXPERT_SETS = st.sets(st.integers(0, E - 1), min_size=1).map(sorted)


class FlakyFile(DirectFile):
    """Fails on demand."""

    broken = threading.Event()

    def read(self, memory: memoryview, offset: int, needed: int) -> None:
        if self.broken.is_set():
            raise ExpertReadError(f"{self.path}: read error")
        super().read(memory, offset, needed)


class LeavesOnHost:
    """A MissChoice that leaves some missing experts, and says of some that they need not be brought."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_host(self, layer: int, missing: Sequence[int], counts: Sequence[int], num_coming: int) -> list[int]:
        return list(missing[:: self._step])

    def stays(self, layer: int, expert: int) -> bool:
        return (layer + expert) % 3 == 0


class CacheMachine(RuleBasedStateMachine):
    """One cache over a real file; at most one acquisition at a time, as in the engine."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.chunk_bytes = fetch.CHUNK_BYTES
        fetch.CHUNK_BYTES = 4096  # several chunks an expert
        self.wanted: Acquisition | None = None
        FlakyFile.broken.clear()

    @initialize(
        slots=SLOTS, policy=st.sampled_from(policy_names()), num_transit=st.integers(0, 3), leaves=st.integers(0, 2)
    )
    def build(self, slots: Capacity, policy: str, num_transit: int, leaves: int) -> None:
        self.store = split_store(self.folder)
        arena = HostArena(self.store.num_total + num_transit, self.store.slot_bytes)
        keeper = find_policy(policy)(len(LAYERS), E)
        self.fetcher = SteppedFetcher(FlakyFile)
        self.cache = ExpertCache(
            self.store,
            lambda w: w,
            arena,
            slots,
            num_transit,
            keeper,
            self.fetcher,
            start_early_bytes=0,
            misses=LeavesOnHost(leaves) if leaves else None,
        )
        self.asked = self.answered = 0

    @precondition(lambda self: self.wanted is None)
    @rule(layer=st.sampled_from(LAYERS), experts=EXPERT_SETS)
    def acquire(self, layer: MoELayer, experts: list[int]) -> None:
        self.wanted = self.cache.acquirer.acquire(layer, experts, [1] * len(experts))
        self.asked = len(experts) - len(self.wanted.on_host)
        self._skip_if_all_on_host()
        self.answered = 0

    @precondition(lambda self: self.wanted is not None and self.wanted.ready)
    @rule(data=st.data())
    def release_one(self, data: st.DataObject) -> None:
        assert self.wanted is not None
        expert = data.draw(st.sampled_from(sorted(self.wanted.ready)))
        self.cache.acquirer.release(self.wanted, expert)
        self.answered += 1
        self._finish()

    @precondition(lambda self: self.wanted is not None and self.wanted.in_flight)
    @rule()
    def wait(self) -> None:
        assert self.wanted is not None
        self.cache.acquirer.wait(self.wanted)
        self._finish()

    @precondition(lambda self: self.wanted is not None)
    @rule()
    def abandon(self) -> None:
        assert self.wanted is not None
        self.cache.acquirer.abandon(self.wanted)
        self.wanted = None

    @rule(layer=st.sampled_from(LAYERS), experts=EXPERT_SETS)
    def prefetch(self, layer: MoELayer, experts: list[int]) -> None:
        pinned = dict(self.wanted.ready) if self.wanted else {}
        self.cache.prefetch(layer, experts, [1.0] * len(experts))
        assert self.wanted is None or self.wanted.ready == pinned

    @rule(num_chunks=st.integers(1, 8))
    def let_the_disk_work(self, num_chunks: int) -> None:
        """In the background, as far as the engine is concerned."""
        for _ in range(num_chunks):
            self.fetcher.step()

    @rule()
    def cancel(self) -> None:
        self.cache.cancel_prefetches()

    @precondition(lambda self: self.wanted is None)
    @rule(num_slots=st.integers(1, 10))
    def resize(self, num_slots: int) -> None:
        self.cache.resize(num_slots)
        assert self.cache.used_bytes <= num_slots * self.store.slot_bytes

    @precondition(lambda self: self.wanted is None)
    @rule(kept=st.sets(st.sampled_from([(index, e) for index in range(len(LAYERS)) for e in range(E)])))
    def keep_only(self, kept: set[tuple[int, int]]) -> None:
        wanted = np.zeros((len(LAYERS), E), np.bool_)
        for key in kept:
            wanted[key] = True
        self.cache.keep_only(wanted)
        assert not (self.cache.residency().ready & ~wanted).any()

    @rule(broken=st.booleans())
    def break_disk(self, broken: bool) -> None:
        (FlakyFile.broken.set if broken else FlakyFile.broken.clear)()

    def _skip_if_all_on_host(self) -> None:
        if not self.asked:
            self.wanted = None

    def _finish(self) -> None:
        """Every expert asked for is either run or failed, none twice, none forgotten."""
        assert self.wanted is not None
        if not self.wanted.ready and not self.wanted.is_pending:
            assert self.answered + len(self.wanted.failed) == self.asked
            self.wanted = None

    @invariant()
    def everything_adds_up(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check_integrity()
        if self.wanted is not None:
            for expert, weights in (self.wanted.ready | self.wanted.inputs).items():
                assert isinstance(weights, ExpertWeights)
                original = self.store.weights(self.wanted.layer, expert)
                assert torch.equal(plain(weights.gate), plain(original.gate))
                assert torch.equal(plain(weights.up), plain(original.up))
                assert expert not in self.wanted.ready or torch.equal(plain(weights.down), plain(original.down))

    def teardown(self) -> None:
        fetch.CHUNK_BYTES = self.chunk_bytes
        if hasattr(self, "cache"):
            self.cache.close()
        shutil.rmtree(self.folder)


class TestCacheStates(CacheMachine.TestCase):  # type: ignore[misc,valid-type]
    settings = settings(
        max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )


def test_threads_and_a_random_order_of_everything(tmp_path: Path) -> None:
    """The machine above is single-threaded to be repeatable; here two threads read while the cache changes."""
    store, chooser = split_store(tmp_path), random.Random(0)
    arena = HostArena(store.num_total + 1, store.slot_bytes)
    cache = ExpertCache(store, lambda w: w, arena, Capacity.shared(4), 1, find_policy("lru")(2, E), Fetcher(2))
    for _ in range(400):
        layer, experts = chooser.choice(LAYERS), sorted(chooser.sample(range(E), chooser.randint(1, E)))
        if chooser.random() < 0.5:
            cache.prefetch(chooser.choice(LAYERS), chooser.sample(range(E), 2), [2.0, 1.0])
        wanted = cache.acquirer.acquire(layer, experts, [1] * len(experts))
        while wanted.ready or wanted.is_pending:
            for expert, weights in list(wanted.ready.items()):
                assert isinstance(weights, ExpertWeights)
                assert torch.equal(plain(weights.down), plain(store.weights(layer, expert).down))
                cache.acquirer.release(wanted, expert)
                experts.remove(expert)
            if wanted.is_pending:
                cache.acquirer.wait(wanted)
        assert not experts
        if chooser.random() < 0.1:
            cache.resize(chooser.randint(1, 10))
        cache.check_integrity()
    cache.close()


@pytest.mark.parametrize("slots", [Capacity.shared(1), Capacity.uniform(1, 2)], ids=["shared", "per_layer"])
def test_prefetching_never_takes_a_pinned_slot(slots: Capacity, tmp_path: Path) -> None:
    store = split_store(tmp_path)
    arena = HostArena(store.num_total, store.slot_bytes)
    cache = ExpertCache(store, lambda w: w, arena, slots, 0, find_policy("lru")(2, E), Fetcher())
    wanted = cache.acquirer.acquire(FIRST, [1], [1])
    while wanted.in_flight:
        cache.acquirer.wait(wanted)
    cache.prefetch(FIRST, [0, 2, 3, 4], [1.0] * 4)
    cache.prefetch(SECOND, [0, 2, 3, 4], [1.0] * 4)
    assert isinstance(wanted.ready[1], ExpertWeights)
    assert torch.equal(plain(wanted.ready[1].down), plain(store.weights(FIRST, 1).down))
    assert cache.table.slot_of[0, 1] >= 0
    cache.check_integrity()
    cache.close()
