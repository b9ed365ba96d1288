"""Expert reports over ranks: all ranks' as one.

Every rank says once a second, with its sign of life, what its experts have done; nothing waits for it. Knows
reports; knows no sockets.

Shape alphabet: L layers by dense index, E experts per layer.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from dataclasses import replace
from functools import reduce
from typing import Any

import numpy as np

from expert_cache.report import ExpertReport, Residency

Reports = Mapping[int, ExpertReport]
"""By rank."""


def merge(reports: Items[ExpertReport]) -> ExpertReport:
    """Sums over ranks; an expert is resident where it is on any. Each rank's cache has its own gap to the best
    possible one, and there is none of them all."""
    first = reports[0]
    return replace(
        first,
        tokens=_sum([report.tokens for report in reports]),
        counts={name: _sum([report.counts[name] for report in reports]) for name in first.counts},
        residency=_merge_residency([report.residency for report in reports]),
        shadow_hits=_sum([Counter(report.shadow_hits) for report in reports]),
        belady_gap_frac=None,
    )


def _merge_residency(parts: Items[Residency]) -> Residency:
    """Links work side by side: the time they were busy is the mean, so that bytes over time is their rate together."""
    used = reduce(np.logical_or, [part.ready & ~part.unused for part in parts])
    ready = reduce(np.logical_or, [part.ready for part in parts])
    return replace(
        parts[0],
        ready=ready,
        unused=ready & ~used,
        num_slots=_sum([part.num_slots for part in parts]),
        used_bytes=_sum([part.used_bytes for part in parts]),
        link_bytes=_sum([part.link_bytes for part in parts]),
        link_busy_s=_sum([part.link_busy_s for part in parts]) / len(parts),
    )


def _sum(values: Items[Any]) -> Any:
    return reduce(lambda left, right: left + right, values)


def _history(report: ExpertReport) -> ExpertReport:
    """What remains of a group of ranks that has ended: its counts, and no residency."""
    nothing = np.zeros_like(report.residency.ready)
    gone = replace(report.residency, ready=nothing, unused=nothing, num_slots=0, used_bytes=0)
    return replace(report, residency=gone)


class TeamReports:
    """All ranks' reports since the server's start, over the groups of ranks there have been. Any thread may ask."""

    def __init__(self, current: Callable[[], tuple[int, Reports]]) -> None:
        """`current`: the generation of the group, and each rank's last report."""
        self._current = current
        self._lock = threading.Lock()
        self._generation = 0
        self._now: ExpertReport | None = None
        self._before: ExpertReport | None = None
        """Of the groups before this one."""

    def by_rank(self) -> Reports:
        """Since the present group's start."""
        return self._current()[1]

    def total(self) -> ExpertReport | None:
        """None until a group of ranks has been ready."""
        with self._lock:
            generation, reports = self._current()
            if reports:
                if generation != self._generation:
                    self._generation, self._before = generation, self._end_group()
                self._now = merge(list(reports.values()))
            return self._with_history()

    def _end_group(self) -> ExpertReport | None:
        total = self._with_history()
        return None if total is None else _history(total)

    def _with_history(self) -> ExpertReport | None:
        if self._now is None or self._before is None:
            return self._now
        together = merge([self._now, self._before])
        residency = replace(
            together.residency,
            link_busy_s=self._now.residency.link_busy_s + self._before.residency.link_busy_s,
        )
        return replace(together, residency=residency)
