"""MemoryGuard: gives expert slots back when memory gets short, and takes them again when it no longer is.

Other processes grow, prompts get longer, the machine starts to swap or kill: the expert cache is the
one large thing here that can shrink at no cost but speed. Asked between steps. Knows sizes, no experts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

CHECK_INTERVAL_S = 0.5
RESERVE_FRAC = 0.05
"""Of what was free at the start: below this the cache shrinks, above twice this it may grow."""
MIN_RESERVE_BYTES = 128 << 20


class MemoryGuard:
    """Decides how many slots there should be."""

    def __init__(
        self,
        num_slots: int,
        slot_bytes: int,
        free_bytes: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`num_slots`: what the user asked for; the guard never goes beyond."""
        self.wanted_slots = num_slots
        self._num_slots = num_slots
        self._slot_bytes = slot_bytes
        self._free_bytes = free_bytes
        self._clock = clock
        self._next_check = 0.0
        self._reserve = max(MIN_RESERVE_BYTES, int(free_bytes() * RESERVE_FRAC))

    def check(self, num_owned: int) -> int | None:
        """The number of slots to resize to, or None while nothing has to change. `num_owned`: slots in use."""
        now = self._clock()
        if now < self._next_check:
            return None
        self._next_check = now + CHECK_INTERVAL_S
        free = self._free_bytes()
        if free < self._reserve:
            return self._shrink(num_owned, self._reserve - free)
        room = (free - 2 * self._reserve) // self._slot_bytes
        if self._num_slots < self.wanted_slots and room > 0:
            return self._change(min(self.wanted_slots, self._num_slots + room))
        return None

    def resized(self, num_slots: int) -> None:
        """The user asked for another number."""
        self.wanted_slots = self._num_slots = num_slots

    def _shrink(self, num_owned: int, shortage_bytes: int) -> int | None:
        """Only slots in use hold memory, so the new number counts down from those."""
        fewer = max(1, min(self._num_slots, num_owned) - -(-shortage_bytes // self._slot_bytes))
        return self._change(fewer) if fewer < self._num_slots else None

    def _change(self, num_slots: int) -> int:
        log.warning("memory: the expert cache changes from %d to %d slots", self._num_slots, num_slots)
        self._num_slots = num_slots
        return num_slots
