"""StepTimes: what a decoding step takes, and how much longer it takes with drafts.

Steps are compared with those of as many sequences alone. What a draft costs is kept as a ratio, so that it stays true
when contexts grow or other processes come and go. Knows numbers only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

RECENT = 16
FEWEST_PLAIN = 4
"""Plain steps of a size that must be known before any is drafted for."""
ASSUMED_COST = 0.25
"""Of a draft, in tokens of a plain step, before one of its kind was timed."""


class Recent:
    """The mean of the middle half of the newest values: a busy machine's outliers do not fool it."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=RECENT)

    def add(self, value: float) -> None:
        self._values.append(value)

    def __len__(self) -> int:
        return len(self._values)

    @property
    def mean(self) -> float:
        cut = len(self._values) // 4
        kept = sorted(self._values)[cut : len(self._values) - cut]
        return sum(kept) / len(kept)


class StepTimes:
    """Times by number of sequences, and by number of drafts in a step."""

    def __init__(self) -> None:
        self._plain: dict[int, Recent] = {}
        self._ratios: dict[tuple[int, int], Recent] = {}
        """(class of the number of sequences, class of the number of drafts) -> time over that of a plain step."""

    def add_plain(self, num_seqs: int, seconds: float) -> None:
        self._plain.setdefault(size_class(num_seqs), Recent()).add(seconds)

    def plain_s(self, num_seqs: int) -> float | None:
        """Of a step without drafts; None: too few are known."""
        found = self._plain.get(size_class(num_seqs))
        return found.mean if found is not None and len(found) >= FEWEST_PLAIN else None

    def add_drafted(self, num_seqs: int, num_drafts: int, seconds: float) -> None:
        """Plain steps of as many sequences must be known."""
        plain = self.plain_s(num_seqs)
        assert plain is not None
        key = size_class(num_seqs), size_class(num_drafts)
        self._ratios.setdefault(key, Recent()).add(seconds / plain)

    def ratio(self, num_seqs: int, num_drafts: int) -> float:
        """Time of a step with drafts over that of one without: measured, or drawn through what was measured."""
        if not num_drafts:
            return 1.0
        seqs = size_class(num_seqs)
        found = self._ratios.get((seqs, size_class(num_drafts)))
        if found is not None:
            return found.mean
        return _through(self._known(seqs), num_drafts, ASSUMED_COST / num_seqs)

    def _known(self, seqs: int) -> Iterable[tuple[int, float]]:
        return [(drafts, times.mean) for (size, drafts), times in self._ratios.items() if size == seqs]


def size_class(count: int) -> int:
    """Counts of one class take about as long: each up to 8 is its own, then eighths of a doubling."""
    if count <= 8:
        return count
    step = 1 << (count.bit_length() - 4)
    return count // step * step


def _through(known: Iterable[tuple[int, float]], num_drafts: int, assumed: float) -> float:
    """The line between the nearest known points; beyond the last one it goes on as if from no drafts to there."""
    points = sorted([(0, 1.0), *known])
    before = max(point for point in points if point[0] <= num_drafts)
    after = [point for point in points if point[0] > num_drafts]
    if after:
        (x, y), (next_x, next_y) = before, after[0]
        return y + (next_y - y) * (num_drafts - x) / (next_x - x)
    slope = assumed if before[0] == 0 else (before[1] - 1.0) / before[0]
    return before[1] + slope * (num_drafts - before[0])
