"""Admission: whether one more request may wait, and when a refused one should come back.

A queue that is bounded in requests, in prompt tokens and in time. Knows numbers only: no requests, no threads.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable

from moe_serve.config import EngineConfig
from moe_serve.errors import OverloadedError

RECENT_SAMPLES = 64
"""Finished samples that the expected wait is worked out from."""
SEATS_PER_STANDING = 16
"""In an overload one request may wait for so many seats: enough to fill a seat as soon as it is free."""
GROWTH_WINDOW_S = 2.5
"""In two of these in a row the queue of an overload grows fast; two without a refusal end it."""
OVERLOAD_GROWTH = 1.5
"""Seconds of waiting that are added in a second: 2.5 times the load, where a machine that stands still adds one."""
SAMPLE_S = GROWTH_WINDOW_S / 25
MAX_RETRY_AFTER_S = 60


class Admission:
    """The queue's limits, and what is known of how fast it moves."""

    def __init__(self, config: EngineConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._seat_times_s: deque[float] = deque(maxlen=RECENT_SAMPLES)
        self._last_refusal_s = -math.inf
        self._arrivals: deque[tuple[float, int]] = deque([(-math.inf, 0)])
        """When requests came, and how many waited then: some of two windows, and the last one before."""

    def note_finished(self, seat_s: float) -> None:
        """A sample has ended that kept its seat in the batch for so long."""
        self._seat_times_s.append(seat_s)

    def note_arrival(self, num_queued: int) -> None:
        """A request has come, and finds so many waiting."""
        now_s = self._clock()
        if now_s - self._arrivals[-1][0] < SAMPLE_S:
            return
        self._arrivals.append((now_s, num_queued))
        while self._arrivals[1][0] < now_s - 2 * GROWTH_WINDOW_S:
            self._arrivals.popleft()

    def check(self, num_queued: int, prompt_tokens: int, queued_tokens: Callable[[], int]) -> None:
        """OverloadedError if a request that finds every seat taken may not wait behind `num_queued` others."""
        config = self._config
        if num_queued >= config.max_num_queued_reqs:
            raise self.refusal(num_queued, f"{num_queued} requests are waiting already")
        if config.max_queue_wait is not None:
            self._check_wait(num_queued, config.max_queue_wait)
        if config.max_num_queued_tokens is not None:
            tokens = queued_tokens()
            if tokens + prompt_tokens > config.max_num_queued_tokens:
                raise self.refusal(num_queued, f"{tokens} prompt tokens are waiting already")

    def _check_wait(self, num_queued: int, longest_s: float) -> None:
        """A burst may wait for the whole max_queue_wait. But in an overload a long queue only makes every accepted
        request late: then no more may wait than keep the seats filled, until for a while nothing had to be refused
        (the idea of controlled delay; B. Maurer, Fail at Scale, ACM Queue 2015)."""
        wait_s = self.expected_wait_s(num_queued + 1)
        if wait_s > longest_s:
            raise self.refusal(num_queued, f"it would wait for about {wait_s:.1f} s, longer than it may")
        if num_queued >= self.num_standing and (self.is_overloaded or self._grows_too_fast(num_queued)):
            raise self.refusal(num_queued, f"more come than can be served, and it would wait for about {wait_s:.1f} s")

    @property
    def num_standing(self) -> int:
        """Requests that may wait in an overload."""
        return max(1, self._config.max_num_seqs // SEATS_PER_STANDING)

    @property
    def is_overloaded(self) -> bool:
        """Something was refused not long ago."""
        is_limited = self._config.max_queue_wait is not None
        return is_limited and self._clock() - self._last_refusal_s < 2 * GROWTH_WINDOW_S

    def _grows_too_fast(self, num_queued: int) -> bool:
        """Far more comes than can be served, and not all at once."""
        one_s, now_s = self.expected_wait_s(1), self._clock()
        if one_s == 0:
            return False
        in_window = OVERLOAD_GROWTH * GROWTH_WINDOW_S / one_s
        before, long_before = (self._num_queued_at(now_s - age * GROWTH_WINDOW_S) for age in (1, 2))
        return num_queued - before > in_window and before - long_before > in_window

    def _num_queued_at(self, time_s: float) -> int:
        """What one of the last requests before then found."""
        return next(num_queued for came_s, num_queued in reversed(self._arrivals) if came_s <= time_s)

    def expected_wait_s(self, num_queued: int) -> float:
        """Seconds until so many requests have found seats, from how long recent samples kept theirs.

        Not from how many finished per second: that says how fast requests came, unless the batch was full.
        """
        if not self._seat_times_s:
            return 0.0
        return num_queued * statistics.fmean(self._seat_times_s) / self._config.max_num_seqs

    def refusal(self, num_queued: int, reason: str) -> OverloadedError:
        """The error for a request that is refused now: come back when half the queue should be gone."""
        self._last_refusal_s = self._clock()
        seconds = math.ceil(self.expected_wait_s(num_queued) / 2)
        message = f"the request is refused: {reason}; try again later"
        return OverloadedError(message, max(1, min(MAX_RETRY_AFTER_S, seconds)))
