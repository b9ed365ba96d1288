"""Recorded routing of two models, where it is at hand: `affinity` gets as far towards the bound as was asked of it.

Its constants were chosen on parts of other traces (mmlu_dev, esft_law).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from expert_cache.simulation.capacity import Capacity
from expert_cache.simulation.events import events_of
from expert_cache.simulation.replay import compare
from predictors.trace import load

TRACES = Path(__file__).parents[3] / "shared" / "data" / "traces"
BARS = {"gpt-oss-20b/mmlu_pro_validation": 0.28, "deepseek-v2-lite/esft_summary": 0.15}


@pytest.mark.parametrize("name", BARS)
def test_affinity_closes_the_gap_and_lfru_is_no_worse_than_lru(name: str) -> None:
    path = TRACES / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    trace = load(path).head(600)
    slots = Capacity.of_frac(0.25, trace.num_layers, trace.num_experts)
    rows = {row.policy: row.gap_closed_frac for row in compare(events_of(trace), ["affinity", "lfru"], slots)}
    assert rows["affinity"] >= BARS[name]
    assert rows["lfru"] >= 0
