"""What the dashboard says is wrong: each rule at its limit, and silence where nothing is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moe_serve.config import EngineConfig
from moe_serve.scheduling.stats import EngineLoad
from moe_serve.server.monitoring.findings import Situation, findings
from moe_serve.server.monitoring.interval import Interval, Moment, Totals
from tests.server.conftest import expert_report

CONFIG = EngineConfig.from_dict({"model": "m", "max_num_seqs": 4})
IDLE = EngineLoad(0, 0, 0.0)


def window(
    hits: int = 90, misses: int = 10, stall_s: float = 0.0, shadow: int = 0, slow_tier: str = "disk"
) -> Interval:
    """Ten seconds of a cache that starts empty."""
    empty, later = expert_report(0), expert_report(1)
    counts = {
        **later.counts,
        "hits": np.array([hits, 0]),
        "misses": np.array([misses, 0]),
        "stall_s": np.array([stall_s, 0]),
    }
    residency = replace(later.residency, slow_tier=slow_tier, link_bytes=50_000_000, link_busy_s=0.5)
    end = replace(later, counts=counts, residency=residency, shadow_hits={"lru": shadow})
    return Interval(Moment(0.0, Totals(), empty), Moment(10.0, Totals(), end))


def situation(**values: Any) -> Situation:
    well = {"state": "ready", "cause": None, "load": IDLE, "num_rejected": 0, "window": window(), "config": CONFIG}
    return Situation(**{**well, **values})


def titles(**values: Any) -> list[str]:
    return [finding.title for finding in findings(situation(**values))]


def test_nothing_is_wrong_with_a_quiet_server() -> None:
    assert titles() == []
    assert titles(window=Interval(Moment(0.0, Totals(), None), Moment(9.0, Totals(), None))) == []
    assert titles(load=EngineLoad(4, 0, 0.89), window=window(hits=50, misses=50, stall_s=1.9)) == []


@pytest.mark.parametrize(
    ("values", "title", "advice"),
    [
        ({"state": "dead", "cause": "A file has changed."}, "The engine is dead", "A file has changed."),
        ({"state": "draining"}, "The server is draining", "Start it again"),
        ({"num_rejected": 1}, "1 request refused in the last minute", "--max-queue-wait-s"),
        ({"num_rejected": 7}, "7 requests refused", "Add a server"),
        ({"load": EngineLoad(4, 2, 0.1)}, "2 waiting: all 4 seats", "--max-num-seqs"),
        ({"load": EngineLoad(2, 3, 0.9)}, "3 waiting: KV pages are 90% full", "--kv-cache-mib"),
        ({"load": EngineLoad(2, 0, 0.95)}, "KV pages are 95% full", "--kv-cache-mib"),
        ({"window": window(stall_s=2.0)}, "20% of the time goes to waiting for the disk, which gives 100 MB/s", "pack"),
        (
            {"window": window(stall_s=9.0, slow_tier="host")},
            "90% of the time goes to waiting for the link",
            "--moe-cache-mib",
        ),
        (
            {"window": window(hits=49, misses=51)},
            "49% of the needed experts were in memory",
            "holds 75% of all experts",
        ),
        ({"window": window(shadow=93)}, "Policy lru would have had 93% hits", "--moe-cache-policy lru"),
    ],
)
def test_each_fault_is_named_with_what_helps(values: dict[str, Any], title: str, advice: str) -> None:
    (finding,) = findings(situation(**values))
    assert finding.title.startswith(title)
    assert advice in finding.advice
    assert finding.severity == ("problem" if {"state", "num_rejected"} & set(values) else "watch")


def test_a_policy_that_is_hardly_better_is_not_named() -> None:
    assert titles(window=window(shadow=92)) == []


def test_a_request_that_waits_for_the_next_step_is_no_fault() -> None:
    assert titles(load=EngineLoad(2, 1, 0.1)) == []


def test_problems_come_first() -> None:
    found = findings(
        situation(num_rejected=2, load=EngineLoad(4, 9, 0.1), window=window(hits=1, misses=9, stall_s=5.0))
    )
    assert [finding.severity for finding in found] == ["problem", "watch", "watch", "watch"]
