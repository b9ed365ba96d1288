"""Seats: the numbered places in the running batch. A recurrent layer keeps a sequence's state in its seat's row.

Knows numbers; knows no tensors and no sequences.
"""

from __future__ import annotations

from collections.abc import Iterable

NO_SEAT = -1
"""Of a sequence that waits."""


class Seats:
    """One seat for each sequence that may run, so that one is free for each that is admitted."""

    def __init__(self, num_seats: int) -> None:
        self.num_seats = num_seats
        self._free = list(range(num_seats - 1, -1, -1))

    def take(self) -> int:
        """A free seat, the one that was given back last: its memory has been written before."""
        return self._free.pop()

    def give_back(self, seat: int) -> None:
        """NO_SEAT is ignored."""
        if seat != NO_SEAT:
            self._free.append(seat)

    def check_integrity(self, held: Iterable[int]) -> None:
        """`held`: the seat of every live sequence. AssertionError if seats are lost or shared."""
        taken = [seat for seat in held if seat != NO_SEAT]
        assert sorted([*taken, *self._free]) == list(range(self.num_seats)), "seats are lost or shared"
