"""The figures, from outcomes whose figures can be worked out by hand."""

from __future__ import annotations

import pytest

from moe_serve.loadtest.client import Outcome
from moe_serve.loadtest.summary import (
    DETAIL_KEYS,
    METRIC_TITLES,
    SummaryOptions,
    percentile,
    sections,
    summarise,
    without_details,
)

ALL = SummaryOptions(("ttft", "tpot", "itl", "e2el"), (50.0, 99.0, 99.9), {})
HAND_MADE = [
    Outcome(start_s=10.0, token_times_s=[0.1, 0.2, 0.4], input_tokens=7, output_tokens=3, text="abc"),
    Outcome(start_s=10.3, token_times_s=[0.3], input_tokens=5, output_tokens=1, text="d"),
    Outcome(start_s=11.0, input_tokens=100, error="no"),
]


def test_totals_and_rates_count_completed_requests_only() -> None:
    result = summarise(HAND_MADE, 2.0, ALL)
    assert (result["completed"], result["failed"]) == (2, 1)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (12, 4)
    assert (result["request_throughput"], result["output_throughput"]) == (1.0, 2.0)
    assert result["total_token_throughput"] == 8.0
    assert result["request_goodput"] is None
    assert result["max_concurrent_requests"] == 2
    assert result["max_output_tokens_per_s"] == 4.0


def test_latencies_in_milliseconds() -> None:
    result = summarise(HAND_MADE, 2.0, ALL)
    assert result["mean_ttft_ms"] == pytest.approx(200)
    assert result["std_ttft_ms"] == pytest.approx(100)
    assert result["mean_tpot_ms"] == pytest.approx(150), "an answer of one token has no TPOT"
    assert result["median_itl_ms"] == pytest.approx(150)
    assert result["mean_e2el_ms"] == pytest.approx(350)
    assert result["p99_e2el_ms"] == pytest.approx(399)
    assert result["p99.9_e2el_ms"] == pytest.approx(399.9)


@pytest.mark.parametrize(
    ("limits", "good"), [({"ttft": 100}, 1), ({"e2el": 400}, 2), ({"tpot": 149}, 1), ({"ttft": 300, "e2el": 1}, 0)]
)
def test_goodput_needs_every_limit_kept(limits: dict[str, float], good: int) -> None:
    options = SummaryOptions(("ttft",), (99.0,), limits)
    assert summarise(HAND_MADE, 2.0, options)["request_goodput"] == good / 2


@pytest.mark.parametrize(("p", "value"), [(0, 1), (50, 6), (100, 20), (75, 12.5)])
def test_percentiles_are_linear_between_ranks(p: float, value: float) -> None:
    assert percentile([20, 1, 10, 2], p) == value


def test_nothing_completed_gives_zeros() -> None:
    result = summarise(HAND_MADE[2:], 1.0, ALL)
    assert (result["completed"], result["p99_ttft_ms"], result["max_concurrent_requests"]) == (0, 0.0, 0)


def test_requests_that_follow_one_another_do_not_overlap() -> None:
    back_to_back = [Outcome(start_s=s, token_times_s=[0.5], output_tokens=1) for s in (0.0, 0.5, 1.0)]
    assert summarise(back_to_back, 2.0, ALL)["max_concurrent_requests"] == 1


def test_details_are_per_request_and_can_be_left_out() -> None:
    result = summarise(HAND_MADE, 2.0, ALL)
    assert result["itls"][0] == pytest.approx([0.1, 0.2])
    assert result["errors"] == ["", "", "no"]
    assert set(result) - set(without_details(result)) == set(DETAIL_KEYS)


def test_the_sections_show_every_metric() -> None:
    result = summarise(HAND_MADE, 2.0, ALL)
    shown = dict(sections(result, ALL))
    assert list(shown) == ["Requests", *(f"{METRIC_TITLES[metric]} (ms)" for metric in ALL.metrics)]
    rows = dict(row for section in shown.values() for row in section)
    assert rows["p99.9 e2el"] == f"{result['p99.9_e2el_ms']:.2f}"
    assert not any("goodput" in title for title in rows)
