"""WaitingLine: sequences without a place in the batch, and which of them is next.

Preempted ones come first, then those of the lowest priority value; among equals the client that was served least, and
of one client the oldest. With one client that is first come, first served. Paused ones keep their place and are passed
over. Knows shares; knows no pages and no budget.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from moe_serve.scheduling.fair_shares import FairShares
from moe_serve.scheduling.sequence import Sequence


class WaitingLine:
    """A queue of sequences. Iterates in order of preemption, priority and arrival."""

    def __init__(self, shares: FairShares) -> None:
        self._shares = shares
        self._line: deque[Sequence] = deque()

    def __len__(self) -> int:
        return len(self._line)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._line)

    def add(self, seq: Sequence) -> None:
        """Behind those of the same or a lower priority value, and behind preempted ones."""
        place = len(self._line)
        while place > 0 and _goes_before(seq, self._line[place - 1]):
            place -= 1
        self._line.insert(place, seq)

    def appendleft(self, seq: Sequence) -> None:
        """Put a preempted sequence before all others."""
        self._line.appendleft(seq)

    def remove(self, seq: Sequence) -> None:
        self._line.remove(seq)

    def next(self) -> Sequence | None:
        """Who gets the next place; None if there is no such sequence."""
        ready = (seq for seq in self._line if not seq.is_paused)
        first = next(ready, None)
        if first is None or first.num_preemptions or not self._shares.are_shared:
            return first
        best, least = first, self._shares.served(first.client)
        for seq in ready:
            if seq.request.priority != first.request.priority:
                break
            served = self._shares.served(seq.client)
            if served < least:
                best, least = seq, served
        return best


def _goes_before(new: Sequence, waiting: Sequence) -> bool:
    return new.request.priority < waiting.request.priority and waiting.num_preemptions == 0
