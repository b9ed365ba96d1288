"""The last minute of an engine: what enters the window, what leaves it, and the arithmetic on it."""

from __future__ import annotations

import numpy as np
import pytest

from expert_cache.report import ExpertReport, ExpertTotals, Residency
from moe_serve.scheduling.stats import StepStats
from moe_serve.server.monitoring.last_minute import WINDOW_S, LastMinute


class Clock:
    """Goes when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def step(
    prompt: int = 0,
    generated: int = 0,
    seconds: float = 0.1,
    ttft: tuple[float, ...] = (),
    inter_token: tuple[float, ...] = (),
    **experts: float,
) -> StepStats:
    return StepStats(seconds, prompt, generated, 0, 0, 0, inter_token, ttft, ExpertTotals(**experts))


class Experts:
    """One layer of two experts of 100 bytes; a test moves its counts."""

    def __init__(self) -> None:
        names = ("hits", "misses", "stall_s", "predicted_used", "predicted_unused", "unpredicted")
        self.counts = {name: np.zeros(1) for name in names}
        self.tokens = np.zeros((1, 2), np.int64)
        self.link = (0, 0.0)

    def report(self) -> ExpertReport:
        ready = np.ones((1, 2), np.bool_)
        residency = Residency(ready, ~ready, "device", "disk", 2, 100, 200, *self.link)
        counts = {name: values.copy() for name, values in self.counts.items()}
        return ExpertReport((0,), 100, self.tokens.copy(), counts, residency, {}, None)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def live(clock: Clock) -> LastMinute:
    return LastMinute(lambda: None, clock)


def test_rates_are_those_of_the_last_minute(live: LastMinute, clock: Clock) -> None:
    for _ in range(120):
        clock.now += 1
        live.on_step(step(prompt=3, generated=2))
    assert live.window().seconds == 60
    assert live.window().generated_tokens_per_s == 2
    assert live.window().prompt_tokens_per_s == 3
    assert len(live.seconds()) == 60


def test_what_is_older_leaves_the_window_though_nothing_runs(live: LastMinute, clock: Clock) -> None:
    clock.now += 1
    live.on_step(step(generated=50, ttft=(0.5,)))
    assert live.ttft().p50_s == 0.5
    for _ in range(70):
        clock.now += 1
        window = live.window()
    assert window.generated_tokens_per_s == 0
    assert live.ttft().p50_s is None


def test_a_long_pause_is_no_part_of_the_minute_after_it(live: LastMinute, clock: Clock) -> None:
    clock.now += 0.5
    live.on_step(step(generated=7))
    clock.now += 1000
    live.on_step(step(generated=30, seconds=0.5))
    assert live.window().seconds == 60
    assert live.window().generated_tokens_per_s == pytest.approx(30 / 60)
    clock.now += 0.5
    live.on_step(step(generated=10, seconds=0.5))
    pieces = live.seconds()
    assert [piece.seconds for piece in pieces] == pytest.approx([59, 1])
    assert [piece.generated_tokens_per_s for piece in pieces] == [0, 40]


def test_a_slow_step_is_no_pause(live: LastMinute, clock: Clock) -> None:
    clock.now += 5
    live.window()
    clock.now += 4
    live.on_step(step(generated=8, seconds=6.0))
    assert [(piece.seconds, piece.generated_tokens_per_s) for piece in live.seconds()] == [(5, 0), (4, 2)]


def test_steps_between_two_seconds_are_not_lost(live: LastMinute, clock: Clock) -> None:
    for _ in range(25):
        clock.now += 0.1
        live.on_step(step(generated=1))
    assert live.window().generated_tokens_per_s == pytest.approx(10)
    assert len(live.seconds()) == 2


def test_percentiles(live: LastMinute) -> None:
    live.on_step(step(ttft=tuple(i / 100 for i in range(101))))
    assert live.ttft().count == 101
    assert live.ttft().p50_s == pytest.approx(0.5)
    assert live.ttft().p99_s == pytest.approx(0.99)


def test_time_between_tokens_counts_while_samples_run(live: LastMinute, clock: Clock) -> None:
    assert live.inter_token().count == 0
    live.on_step(step(generated=2, inter_token=(0.3, 0.1)))
    assert live.inter_token().count == 2
    assert live.inter_token().p50_s == pytest.approx(0.2)
    clock.now += WINDOW_S + 1
    assert live.inter_token().count == 0


def test_the_limit_is_that_of_the_needed_bytes_at_the_links_rate(clock: Clock) -> None:
    experts = Experts()
    live = LastMinute(experts.report, clock)
    clock.now += 10
    experts.link = (2000, 0.5)  # 4000 bytes/s
    live.on_step(step(prompt=9, generated=1, seconds=5.0, misses=50))  # a prompt: does not count
    live.on_step(step(generated=4, seconds=0.25, hits=7, misses=4, prefetch_hits=2))
    live.on_step(step(generated=4, seconds=0.25, hits=5, misses=4))
    window = live.window()
    assert window.link_bytes_per_s == 4000
    assert window.decode_tokens_per_s == 16
    # 10 experts of 100 bytes had to come for 8 tokens: a quarter of a second at 4000 bytes/s
    assert window.link_limit_tokens_per_s == 32
    assert window.link_limit_frac == 0.5


def test_without_reads_there_is_no_limit(clock: Clock) -> None:
    live = LastMinute(Experts().report, clock)
    clock.now += 10
    live.on_step(step(generated=4, hits=8))
    window = live.window()
    assert window.link_limit_frac is None
    assert window.link_limit_tokens_per_s is None


def test_expert_fractions_are_of_the_window(clock: Clock) -> None:
    experts = Experts()
    experts.counts["hits"] += 1000
    live = LastMinute(experts.report, clock)
    clock.now += 10
    for name, value in {"hits": 3, "misses": 1, "stall_s": 2.5, "predicted_used": 3, "predicted_unused": 3}.items():
        experts.counts[name] += value
    experts.counts["unpredicted"] += 1
    experts.tokens += np.array([[30, 10]])
    window = live.window()
    assert window.hit_frac == 0.75
    assert window.recalls.tolist() == [0.75]
    assert window.precisions.tolist() == [0.5]
    assert window.balancedness.tolist() == [pytest.approx(2 / 3)]
    assert window.stall_frac == 0.25


def test_nothing_used_is_no_fraction_of_anything(clock: Clock) -> None:
    window = LastMinute(Experts().report, clock).window()
    assert window.hit_frac is None
    assert window.stall_frac == 0
    for values in (window.hit_fracs, window.recalls, window.precisions, window.balancedness):
        assert np.isnan(values).all()
