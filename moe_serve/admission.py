"""Admission: whether one more request may wait, and when a refused one should come back.

A queue that is bounded in requests, in prompt tokens and in time. Knows numbers only: no requests, no threads.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable

from moe_serve.config import EngineConfig
from moe_serve.errors import OverloadedError

RECENT_SAMPLES = 64
"""Finished samples that the expected wait is worked out from."""
MAX_RETRY_AFTER_S = 60


class Admission:
    """The queue's limits, and what is known of how fast it moves."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._seat_times_s: deque[float] = deque(maxlen=RECENT_SAMPLES)

    def note_finished(self, seat_s: float) -> None:
        """A sample has ended that kept its seat in the batch for so long."""
        self._seat_times_s.append(seat_s)

    def check(self, num_queued: int, prompt_tokens: int, queued_tokens: Callable[[], int]) -> None:
        """OverloadedError if a request that finds every seat taken may not wait behind `num_queued` others."""
        config = self._config
        if num_queued >= config.max_num_queued_reqs:
            self._refuse(num_queued, f"{num_queued} requests are waiting already")
        wait_s = self.expected_wait_s(num_queued + 1)
        if config.max_queue_wait is not None and wait_s > config.max_queue_wait:
            self._refuse(
                num_queued, f"it would wait for about {wait_s:.1f} s, longer than this server lets requests wait"
            )
        if config.max_num_queued_tokens is not None:
            tokens = queued_tokens()
            if tokens + prompt_tokens > config.max_num_queued_tokens:
                self._refuse(num_queued, f"{tokens} prompt tokens are waiting already")

    def expected_wait_s(self, num_queued: int) -> float:
        """Seconds until so many requests have found seats, from how long recent samples kept theirs.

        Not from how many finished per second: that says how fast requests came, unless the batch was full.
        """
        if not self._seat_times_s:
            return 0.0
        return num_queued * statistics.fmean(self._seat_times_s) / self._config.max_num_seqs

    def _refuse(self, num_queued: int, reason: str) -> None:
        """Clients are told to come back when half the queue should be gone."""
        seconds = math.ceil(self.expected_wait_s(num_queued) / 2)
        raise OverloadedError(
            f"the request is refused: {reason}; try again later", max(1, min(MAX_RETRY_AFTER_S, seconds))
        )
