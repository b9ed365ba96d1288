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
FULL_SAMPLES = 512
"""Finished samples that say how fast a full batch is: a stall of seconds does not change their mean much."""
SEATS_PER_STANDING = 16
"""Seats per request that may wait in an overload: enough to fill a seat as soon as it is free."""
WINDOW_S = 2.0
"""An overload begins after two windows in a row with too many arrivals; it ends after two without a refusal."""
FEWEST_PER_WINDOW = 24
"""A window is long enough to serve this many requests: few arrivals are noisy."""
OVERLOAD = 1.7
"""Arrivals over the service rate. The bursts of Azure's and Mooncake's arrival traces reach 1.45 at a mean of 0.8."""
SAMPLE_S = WINDOW_S / 25
MAX_RETRY_AFTER_S = 60


class Admission:
    """The queue's limits, and what is known of how fast it moves."""

    def __init__(self, config: EngineConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._seat_times_s: deque[float] = deque(maxlen=RECENT_SAMPLES)
        self._full_seat_times_s: deque[float] = deque(maxlen=FULL_SAMPLES)
        self._is_full = False
        self._last_refusal_s = -math.inf
        self._num_arrivals = 0
        self._arrivals: deque[tuple[float, int]] = deque([(-math.inf, 0)])
        """(time, arrivals until then): some points of two windows, and the last one before."""

    def note_finished(self, seat_s: float) -> None:
        """A sample has ended that kept its seat in the batch for `seat_s`."""
        self._seat_times_s.append(seat_s)
        if self._is_full:
            self._full_seat_times_s.append(seat_s)

    def note_arrival(self, num_queued: int) -> None:
        """A request has come, while `num_queued` others wait."""
        self._num_arrivals += 1
        self._is_full = num_queued > 0
        now_s = self._clock()
        if now_s - self._arrivals[-1][0] < SAMPLE_S:
            return
        self._arrivals.append((now_s, self._num_arrivals))
        while self._arrivals[1][0] < now_s - 2 * self._window_s(self._served_in_s()):
            self._arrivals.popleft()

    def check(self, num_queued: int, prompt_tokens: int, queued_tokens: Callable[[], int]) -> None:
        """OverloadedError if a request that finds every seat taken may not wait behind `num_queued` others."""
        limits = self._config.queue
        if num_queued >= limits.max_num_queued_reqs:
            raise self.refusal(num_queued, f"{num_queued} requests are already waiting")
        if limits.max_queue_wait_s is not None:
            self._check_wait(num_queued, limits.max_queue_wait_s)
        if limits.max_num_queued_tokens is not None:
            tokens = queued_tokens()
            if tokens + prompt_tokens > limits.max_num_queued_tokens:
                raise self.refusal(num_queued, f"{tokens} prompt tokens are already waiting")

    def _check_wait(self, num_queued: int, longest_s: float) -> None:
        """A burst may wait for the whole max_queue_wait_s. But in an overload a long queue only makes every accepted
        request late: then no more may wait than keep the seats filled, until for a while nothing had to be refused
        (the idea of controlled delay; B. Maurer, Fail at Scale, ACM Queue 2015)."""
        wait_s = self.expected_wait_s(num_queued + 1)
        if wait_s > longest_s:
            raise self.refusal(num_queued, f"its wait would be about {wait_s:.1f} s; the limit is {longest_s:g} s")
        if num_queued >= self.num_standing and (self.is_overloaded or self._far_more_come()):
            raise self.refusal(num_queued, f"the server is overloaded, and its wait would be about {wait_s:.1f} s")

    @property
    def num_standing(self) -> int:
        """Requests that may wait in an overload."""
        return max(1, self._config.max_num_seqs // SEATS_PER_STANDING)

    @property
    def is_overloaded(self) -> bool:
        """Something was refused not long ago."""
        is_limited = self._config.queue.max_queue_wait_s is not None
        return is_limited and self._clock() - self._last_refusal_s < 2 * WINDOW_S

    def _far_more_come(self) -> bool:
        """True if two windows in a row had more arrivals than OVERLOAD times the service rate. The queue's length is no
        sign: it grows as fast when the machine stalls for a moment."""
        one_s, now_s = self._served_in_s(), self._clock()
        if one_s == 0:
            return False
        window_s = self._window_s(one_s)
        most = OVERLOAD * window_s / one_s
        before, long_before = (self._num_until(now_s - age * window_s) for age in (1, 2))
        return self._num_arrivals - before > most and before - long_before > most

    def _served_in_s(self) -> float:
        """Seconds per sample of a full batch; an estimate until the batch was full for RECENT_SAMPLES."""
        is_known = len(self._full_seat_times_s) >= RECENT_SAMPLES
        times_s = self._full_seat_times_s if is_known else self._seat_times_s
        return statistics.fmean(times_s) / self._config.max_num_seqs if times_s else 0.0

    def _window_s(self, one_s: float) -> float:
        return max(WINDOW_S, FEWEST_PER_WINDOW * one_s)

    def _num_until(self, time_s: float) -> int:
        """Arrivals until `time_s`, or until the oldest time kept."""
        oldest = self._arrivals[0][1]
        return next((number for came_s, number in reversed(self._arrivals) if came_s <= time_s), oldest)

    def expected_wait_s(self, num_queued: int) -> float:
        """Seconds until `num_queued` requests have seats, from how long recent samples kept theirs.

        Not from how many finished per second: that says how fast requests came, unless the batch was full.
        """
        if not self._seat_times_s:
            return 0.0
        return num_queued * statistics.fmean(self._seat_times_s) / self._config.max_num_seqs

    @property
    def retry_after_s(self) -> int:
        """When one of a client's own requests should have ended: the mean time that samples kept their seats."""
        seconds = math.ceil(statistics.fmean(self._seat_times_s)) if self._seat_times_s else 1
        return max(1, min(MAX_RETRY_AFTER_S, seconds))

    def refusal(self, num_queued: int, reason: str) -> OverloadedError:
        """The error for a request that is refused now: come back when half the queue should be gone."""
        self._last_refusal_s = self._clock()
        seconds = math.ceil(self.expected_wait_s(num_queued) / 2)
        message = f"the request is refused: {reason}; try again later"
        return OverloadedError(message, max(1, min(MAX_RETRY_AFTER_S, seconds)))
