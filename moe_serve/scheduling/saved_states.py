"""SavedStates: which rows hold a recurrent model's state, and at the end of which prefix each was taken.

Keys and values of a prefix can be cut at any page; a state cannot. So copies of states are kept at the ends of some
pages.
Knows row numbers and prefix hashes; knows no tensors (moe_serve/execution/state_cache.py does) and no sequences.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class SavedStates:
    """`num_rows` rows, each empty, being written, or findable by the hash of the page it ends at. The least recently
    used one is given up first."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self._row_of: OrderedDict[bytes, int] = OrderedDict()
        self._free = list(range(num_rows - 1, -1, -1))
        self._versions = [0] * num_rows

    def version_of(self, digest: bytes) -> tuple[int, int] | None:
        """(row, version) of a known prefix; any thread may ask. A row whose version is still the same after it was read
        held that state all the while."""
        row = self._row_of.get(digest)
        return None if row is None else (row, self._versions[row])

    @property
    def num_used(self) -> int:
        """Rows that hold a state, or will after this step."""
        return self.num_rows - len(self._free)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._row_of

    def use(self, digest: bytes) -> int:
        """The row of a known prefix, which now is the most recently used one."""
        self._row_of.move_to_end(digest)
        return self._row_of[digest]

    def take(self) -> int | None:
        """A row to write to; None if all are being written."""
        if self._free:
            return self._free.pop()
        if not self._row_of:
            return None
        row = self._row_of.popitem(last=False)[1]
        self._versions[row] += 1
        return row

    def register(self, row: int, digest: bytes) -> None:
        """Make a written row findable. The first row of a prefix stays; another's is empty again."""
        if digest in self._row_of:
            self._free.append(row)
        else:
            self._row_of[digest] = row

    def give_back(self, row: int) -> None:
        """A row that was taken and not written."""
        self._free.append(row)

    def demote(self, digest: bytes) -> None:
        """Give up this one first: a later state of the same prompt is there."""
        if digest in self._row_of:
            self._row_of.move_to_end(digest, last=False)

    def clear(self) -> None:
        """Forget every state."""
        self._free.extend(self._row_of.values())
        self._row_of.clear()

    def check_integrity(self, taken: Iterable[int]) -> None:
        """`taken`: the rows that are being written. AssertionError if rows are lost or shared."""
        rows = sorted([*taken, *self._free, *self._row_of.values()])
        assert rows == list(range(self.num_rows)), "rows of saved states are lost or shared"
