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
OVERLOADED_WAIT_FRAC = 0.1
MAX_RETRY_AFTER_S = 60


class Admission:
    """The queue's limits, and what is known of how fast it moves."""

    def __init__(self, config: EngineConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._seat_times_s: deque[float] = deque(maxlen=RECENT_SAMPLES)
        self._last_refusal_s = -math.inf

    def note_finished(self, seat_s: float) -> None:
        """A sample has ended that kept its seat in the batch for so long."""
        self._seat_times_s.append(seat_s)

    def check(self, num_queued: int, prompt_tokens: int, queued_tokens: Callable[[], int]) -> None:
        """OverloadedError if a request that finds every seat taken may not wait behind `num_queued` others."""
        config = self._config
        if num_queued >= config.max_num_queued_reqs:
            raise self.refusal(num_queued, f"{num_queued} requests are waiting already")
        wait_s, allowed_s = self.expected_wait_s(num_queued + 1), self.allowed_wait_s()
        if allowed_s is not None and wait_s > allowed_s:
            raise self.refusal(num_queued, f"it would wait for about {wait_s:.1f} s, longer than is allowed now")
        if config.max_num_queued_tokens is not None:
            tokens = queued_tokens()
            if tokens + prompt_tokens > config.max_num_queued_tokens:
                raise self.refusal(num_queued, f"{tokens} prompt tokens are waiting already")

    def allowed_wait_s(self) -> float | None:
        """Longest wait that a request arriving now may have before it; None: any.

        A burst may wait for the whole max_queue_wait. But once requests had to be refused, the server is
        overloaded, and a long queue would only make every accepted request late: then a tenth, until nothing
        has been refused for max_queue_wait (the idea of controlled delay; B. Maurer, Fail at Scale, ACM Queue 2015).
        """
        longest_s = self._config.max_queue_wait
        if longest_s is None:
            return None
        return longest_s * OVERLOADED_WAIT_FRAC if self.is_overloaded else longest_s

    @property
    def is_overloaded(self) -> bool:
        """Something was refused not long ago."""
        longest_s = self._config.max_queue_wait
        return longest_s is not None and self._clock() - self._last_refusal_s < longest_s

    def num_kept(self, num_queued: int) -> int:
        """Of so many that wait, those that may go on waiting now that there is an overload."""
        allowed_s = self.allowed_wait_s()
        if allowed_s is None or self.expected_wait_s(num_queued) <= allowed_s:
            return num_queued
        return int(allowed_s / self.expected_wait_s(1))

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
