"""Which missing experts the CPU takes: by measured times, so that the later of CPU and link is done soonest."""

from __future__ import annotations

from itertools import chain, combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expert_cache.host_compute.crossover import REPEATS, TOKEN_COUNTS, MissCosts, calibrate, cheapest_on_host

COSTS = MissCosts(copy_s=10.0, tokens=(1, 4, 16, 64), host_s=(2.0, 5.0, 17.0, 65.0))
"""One second per token and one per expert."""


@pytest.mark.parametrize(("tokens", "seconds"), [(1, 2), (2, 3), (4, 5), (10, 11), (64, 65), (200, 201)])
def test_times_between_and_beyond_the_measured_ones(tokens: int, seconds: float) -> None:
    assert COSTS.host(tokens) == pytest.approx(seconds)


def test_the_crossover_of_a_single_expert() -> None:
    assert COSTS.crossover_tokens == 9
    assert COSTS.host(9) <= COSTS.copy_s < COSTS.host(10)
    assert MissCosts(1.0, (1, 2), (2.0, 3.0)).crossover_tokens == 0
    assert MissCosts(10.0, (1, 2), (10.0, 11.0)).crossover_tokens == 1
    assert MissCosts(10.0, (1, 64), (2.0, 2.0)).crossover_tokens >= 1 << 20


@pytest.mark.parametrize(
    ("counts", "coming", "chosen"),
    [
        ([1], 0, [0]),  # 2 s on the CPU, 10 s on the link
        ([20], 0, []),
        ([20], 2, [0]),  # the link is busy for 20 s: at 21 s both ways end sooner than at 30 s
        ([1, 1], 0, [0, 1]),
        ([30, 1], 0, [1]),
        ([8, 8, 8], 0, [0, 1]),  # 18 s beside 10 s; three in turn would take 27 s, one 20 s
        ([], 3, []),
    ],
)
def test_the_later_of_both_decides(counts: list[int], coming: int, chosen: list[int]) -> None:
    assert cheapest_on_host(counts, COSTS, coming) == chosen


@given(st.lists(st.integers(1, 100), max_size=7), st.integers(0, 3))
def test_no_other_choice_is_faster(counts: list[int], coming: int) -> None:
    """Against every subset: Fiddler's brute force, which grows as two to the number of experts."""

    def done_s(on_host: tuple[int, ...] | list[int]) -> float:
        copies = coming + len(counts) - len(on_host)
        return max(sum(COSTS.host(counts[i]) for i in on_host), copies * COSTS.copy_s)

    subsets = chain.from_iterable(combinations(range(len(counts)), n) for n in range(len(counts) + 1))
    assert done_s(cheapest_on_host(counts, COSTS, coming)) == pytest.approx(min(done_s(s) for s in subsets))


def test_calibration_times_both_ways_and_forgets_the_first_call() -> None:
    now, calls = 0.0, []

    def clock() -> float:
        return now

    def bring(number: int) -> None:
        nonlocal now
        calls.append(number)
        now += 3.0 if len(calls) > 1 else 100.0

    def run_on_host(number: int, tokens: int) -> None:
        nonlocal now
        calls.append(number)
        now += 0.5 + 0.25 * tokens

    costs = calibrate(bring, run_on_host, clock)
    assert costs.copy_s == pytest.approx(3.0)
    assert costs.host_s == pytest.approx([0.5 + 0.25 * t for t in TOKEN_COUNTS])
    assert costs.crossover_tokens == 10
    assert calls == list(range((1 + len(TOKEN_COUNTS)) * (REPEATS + 1)))
