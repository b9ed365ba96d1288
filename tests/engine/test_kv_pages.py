"""PagePool: counts, sharing, eviction order, and a random walk that must keep every invariant."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from moe_serve.scheduling.kv_pages import PagePool, page_hash


def test_allocate_hands_out_consecutive_pages_of_a_fresh_pool() -> None:
    pool = PagePool(8, 4)
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.num_free == 5


def test_allocate_too_many_changes_nothing() -> None:
    pool = PagePool(4, 4)
    assert pool.allocate(5) is None
    assert pool.num_free == 4


def test_a_published_prefix_is_found_after_its_owner_is_gone() -> None:
    pool = PagePool(4, 2)
    pages = pool.allocate(2)
    assert pages is not None
    first = page_hash(b"", [1, 2])
    second = page_hash(first, [3, 4])
    pool.register(pages[0], first)
    pool.register(pages[1], second)
    pool.free(pages)
    assert pool.match([first, second]) == pages
    assert pool.match([second]) == [pages[1]]
    pool.share(pages)
    assert pool.num_free == 2
    pool.check_integrity([pages])


def test_eviction_takes_the_end_of_a_prefix_before_its_beginning() -> None:
    pool = PagePool(2, 2)
    pages = pool.allocate(2)
    assert pages is not None
    hashes = [page_hash(b"", [1, 2]), page_hash(page_hash(b"", [1, 2]), [3, 4])]
    for page, digest in zip(pages, hashes, strict=True):
        pool.register(page, digest)
    pool.free(pages)
    assert pool.allocate(1) == [pages[1]]
    assert pool.match(hashes) == [pages[0]]


def test_hash_depends_on_everything_before() -> None:
    assert page_hash(b"", [3, 4]) != page_hash(page_hash(b"", [1, 2]), [3, 4])
    assert page_hash(b"", [1, 2]) != page_hash(b"", [2, 1])


def test_clear_cache_empties_only_unreferenced_pages() -> None:
    pool = PagePool(3, 2)
    kept, dropped = pool.allocate(1), pool.allocate(1)
    assert kept is not None
    assert dropped is not None
    pool.register(kept[0], b"kept")
    pool.register(dropped[0], b"dropped")
    pool.free(dropped)
    pool.clear_cache()
    assert pool.match([b"dropped"]) == []
    assert pool.match([b"kept"]) == kept
    pool.check_integrity([kept])


def test_integrity_check_sees_a_leak() -> None:
    pool = PagePool(3, 2)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="reference counts"):
        pool.check_integrity([])


class PoolWalk(RuleBasedStateMachine):
    """Random allocate, share, register and free; the pool must account for every page."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(12, 2)
        self.held: list[list[int]] = []
        self.counter = 0

    @rule(count=st.integers(1, 5))
    def allocate(self, count: int) -> None:
        free = self.pool.num_free
        pages = self.pool.allocate(count)
        assert (pages is None) == (count > free)
        if pages is not None:
            self.held.append(pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def register(self, data: st.DataObject) -> None:
        pages = data.draw(st.sampled_from(self.held))
        self.counter += 1
        self.pool.register(data.draw(st.sampled_from(pages)), str(data.draw(st.integers(0, self.counter))).encode())

    @rule(number=st.integers(0, 30))
    def match_and_share(self, number: int) -> None:
        pages = self.pool.match([str(number).encode()])
        self.pool.share(pages)
        if pages:
            self.held.append(pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.pool.free(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def integrity(self) -> None:
        self.pool.check_integrity(self.held)


TestPoolWalk = PoolWalk.TestCase
TestPoolWalk.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
