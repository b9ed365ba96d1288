"""LastMinute: the last minute of the engine, for gauges and the dashboard.

A StatsObserver. On the engine's thread it adds a few numbers per step and keeps a Moment a second;
everything else is computed when it is asked for. Knows no HTTP and no metrics library.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from expert_cache.report import ExpertReport
from moe_serve.scheduling.finish import FinishedStats
from moe_serve.scheduling.stats import EngineLoad, StepStats
from moe_serve.server.monitoring.interval import Interval, Moment, Totals

WINDOW_S = 60.0
PERIOD_S = 1.0
MAX_TIMES = 4096
"""Of the newest requests or tokens: enough for a percentile, however many come in a minute."""


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of the window's values, in seconds; None if there are none."""

    count: int
    p50_s: float | None
    p99_s: float | None


class RecentTimes:
    """Durations of the last WINDOW_S seconds."""

    def __init__(self) -> None:
        self._values: deque[tuple[float, float]] = deque(maxlen=MAX_TIMES)

    def add(self, now: float, seconds: float) -> None:
        """One more, that ended now."""
        self._values.append((now, seconds))

    def count(self, now: float) -> int:
        """How many ended within the window, of the newest MAX_TIMES."""
        return sum(ended >= now - WINDOW_S for ended, _ in self._values)

    def percentiles(self, now: float) -> Percentiles:
        """Of those that ended within the window."""
        values = [seconds for ended, seconds in self._values if ended >= now - WINDOW_S]
        if not values:
            return Percentiles(0, None, None)
        p50, p99 = np.quantile(values, (0.5, 0.99)).tolist()
        return Percentiles(len(values), p50, p99)


def is_gap(start_s: float, end_s: float) -> bool:
    """Two moments so far apart that nothing ran between them: a step notes one a second."""
    return end_s - start_s > 2 * PERIOD_S


class LastMinute:
    """Written by the engine's thread, read by any."""

    def __init__(self, report: Callable[[], ExpertReport | None], clock: Callable[[], float] = time.monotonic) -> None:
        self._report = report
        self._clock = clock
        self._lock = threading.Lock()
        self._totals = Totals()
        self._ttft = RecentTimes()
        self._inter_token = RecentTimes()
        self._refusals = RecentTimes()
        self._moments: deque[Moment] = deque()
        self.load = EngineLoad(0, 0, 0.0)
        """The newest."""
        self._advance()

    # ---- the engine's thread ------------------------------------------------------------------------

    def on_step(self, stats: StepStats) -> None:
        """Add a step to the totals."""
        old, is_decode = self._totals, stats.num_prompt_tokens == 0
        arriving = stats.experts.misses - stats.experts.host_runs + stats.experts.prefetch_hits
        totals = Totals(
            old.prompt_tokens + stats.num_prompt_tokens,
            old.generated_tokens + stats.num_generated_tokens,
            old.decode_s + is_decode * stats.duration_s,
            old.decode_tokens + is_decode * stats.num_generated_tokens,
            old.decode_experts + is_decode * arriving,
        )
        now = self._clock()
        with self._lock:
            last, began_s = self._moments[-1], now - stats.duration_s
            if is_gap(last.time_s, began_s):  # until this step began nothing changed
                self._moments.append(replace(last, time_s=began_s, totals=old))
            self._totals = totals
            for seconds in stats.time_to_first_token_s:
                self._ttft.add(now, seconds)
            for seconds in stats.inter_token_s:
                self._inter_token.add(now, seconds)
            self._advance()

    def on_load(self, load: EngineLoad) -> None:
        """Queue and pages have changed."""
        self.load = load

    def on_finished(self, stats: FinishedStats) -> None:
        """Each token has been counted when it came."""

    def _advance(self) -> None:
        """A new Moment if one is due; those that no window can start from any more are dropped."""
        now = self._clock()
        if self._moments and now - self._moments[-1].time_s < PERIOD_S:
            return
        self._moments.append(self._moment(now))
        while len(self._moments) > 1 and self._moments[1].time_s <= now - WINDOW_S:
            self._moments.popleft()

    def _moment(self, now: float) -> Moment:
        return Moment(now, self._totals, self._report())

    # ---- any thread -----------------------------------------------------------------------------

    def on_rejected(self) -> None:
        """A request was refused with 503."""
        with self._lock:
            self._refusals.add(self._clock(), 0.0)

    def num_rejected(self) -> int:
        """Requests refused in the window."""
        with self._lock:
            return self._refusals.count(self._clock())

    def window(self) -> Interval:
        """The last WINDOW_S seconds, or as many as there are."""
        with self._lock:
            self._advance()
            end = self._moment(self._clock())
            return Interval(self._kept(end.time_s)[0], end)

    def seconds(self) -> list[Interval]:
        """The window in pieces of about PERIOD_S, oldest first; longer ones where nothing ran or was asked for."""
        with self._lock:
            self._advance()
            moments = self._kept(self._clock())
        return [Interval(a, b) for a, b in pairwise(moments)]

    def _kept(self, now: float) -> list[Moment]:
        """The moments; a gap that reaches out of the window begins with it: what held at its end held throughout."""
        first, *others = self._moments
        if others and is_gap(first.time_s, others[0].time_s) and first.time_s < now - WINDOW_S:
            first = replace(others[0], time_s=now - WINDOW_S)
        return [first, *others]

    def ttft(self) -> Percentiles:
        """Arrival to first token."""
        with self._lock:
            return self._ttft.percentiles(self._clock())

    def inter_token(self) -> Percentiles:
        """From one token of a sample to its next, finished or not."""
        with self._lock:
            return self._inter_token.percentiles(self._clock())
