"""MemoryGuard: shrinks by what is short, grows back, never beyond what was asked for."""

from __future__ import annotations

from expert_cache.host_managed.memory_guard import CHECK_INTERVAL_S, MIN_RESERVE_BYTES, MemoryGuard

SLOT = 10 << 20


class World:
    """A machine whose free memory and clock the test sets."""

    def __init__(self, num_slots: int = 40) -> None:
        self.free, self.now = 1 << 30, 0.0
        self.guard = MemoryGuard(num_slots, SLOT, lambda: self.free, lambda: self.now)

    def check(self, num_owned: int = 40) -> int | None:
        self.now += CHECK_INTERVAL_S
        return self.guard.check(num_owned)


def test_nothing_happens_while_memory_lasts() -> None:
    assert World().check() is None


def test_shrinks_by_the_shortage_and_grows_back() -> None:
    world = World()
    world.free = MIN_RESERVE_BYTES - 3 * SLOT
    assert world.check() == 37
    world.free = 2 * MIN_RESERVE_BYTES - 1
    assert world.check(37) is None  # between the two marks: no to and fro
    world.free = 2 * MIN_RESERVE_BYTES + 2 * SLOT
    assert world.check(37) == 39
    world.free = 1 << 40
    assert world.check(39) == 40
    assert world.check(40) is None


def test_slots_that_were_never_filled_hold_no_memory() -> None:
    world = World()
    world.free = MIN_RESERVE_BYTES - SLOT
    assert world.check(num_owned=10) == 9


def test_one_slot_always_stays() -> None:
    world = World()
    world.free = 0
    assert world.check(num_owned=3) == 1
    assert world.check(num_owned=1) is None


def test_is_asked_seldom() -> None:
    world = World()
    world.free = 0
    assert world.check() is not None
    assert world.guard.check(20) is None  # the clock stands still


def test_a_new_size_from_the_user_is_the_new_limit() -> None:
    world = World()
    world.guard.resized(20)
    world.free = 1 << 40
    assert world.check(20) is None
