"""All ranks' expert reports as one. No processes."""

from __future__ import annotations

import numpy as np

from expert_cache.report import ExpertReport, Residency
from moe_serve.parallel.front.reports import TeamReports, merge
from moe_serve.parallel.wire.messages import Alive, encode, read_rank


def report(ready: list[int], tokens: list[int], hits: int, unused: list[int] | None = None) -> ExpertReport:
    """One layer, number 2, of three experts."""
    residency = Residency(
        np.array([ready], bool), np.array([unused or [0, 0, 0]], bool), "device", "disk", 2, 100, 150, 1000, 2.0
    )
    counts = {"hits": np.array([hits]), "stall_s": np.array([0.25])}
    return ExpertReport((2,), 90, np.array([tokens]), counts, residency, {"lru": hits + 1}, 0.5)


def test_a_report_survives_the_wire() -> None:
    before = report([1, 0, 1], [4, 5, 6], 7, [0, 0, 1])
    message = read_rank(encode(Alive(before)))
    assert isinstance(message, Alive)
    after = message.report
    assert after is not None
    assert after.residency.ready.tolist() == [[True, False, True]]
    assert after.residency.unused.tolist() == [[False, False, True]]
    assert after.residency.num_slots == 2
    assert np.array_equal(after.tokens, before.tokens)
    assert after.counts["stall_s"].tolist() == [0.25]
    assert after.counts["hits"].dtype == np.int64
    assert (after.layers, after.expert_bytes, after.belady_gap_frac) == ((2,), 90, 0.5)
    assert after.shadow_hits == {"lru": 8}


def test_reports_add_up() -> None:
    both = merge([report([1, 0, 0], [4, 0, 1], 3), report([1, 1, 0], [0, 2, 1], 5, [1, 1, 0])])
    assert both.tokens.tolist() == [[4, 2, 2]]
    assert both.counts["hits"].tolist() == [8]
    assert both.residency.ready.tolist() == [[True, True, False]]
    assert both.residency.unused.tolist() == [[False, True, False]]  # rank 0 has used expert 0
    assert (both.residency.num_slots, both.residency.used_bytes) == (4, 300)
    assert both.residency.link_bytes / both.residency.link_busy_s == 1000  # two links of 500 bytes a second
    assert both.shadow_hits == {"lru": 10}
    assert both.belady_gap_frac is None


def test_counts_outlive_the_ranks() -> None:
    """A new group counts from zero; while there is none, the last word holds."""
    current: tuple[int, dict[int, ExpertReport]] = (1, {})
    reports = TeamReports(lambda: current)
    assert reports.total() is None
    current = (1, {r: report([1, 1, 0], [1, 1, 1], 10) for r in (0, 1)})
    assert sum_of(reports) == (6, 20, 4)
    current = (1, {})
    assert sum_of(reports) == (6, 20, 4)
    current = (2, {r: report([0, 0, 1], [0, 0, 1], 1) for r in (0, 1)})
    assert sum_of(reports) == (8, 22, 4)
    assert reports.total().residency.ready.tolist() == [[False, False, True]]  # type: ignore[union-attr]
    current = (3, {0: report([0, 0, 1], [5, 0, 0], 2)})
    assert sum_of(reports) == (13, 24, 2)
    assert [each.tokens.sum() for each in reports.by_rank().values()] == [5]


def sum_of(reports: TeamReports) -> tuple[int, int, int]:
    """Tokens, hits and slots."""
    found = reports.total()
    assert found is not None
    return int(found.tokens.sum()), int(found.counts["hits"].sum()), found.residency.num_slots
