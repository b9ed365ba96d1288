"""How many replicas: more while requests wait too long, fewer while the others could take everything. Pure numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

MOST_GROWTH = 2.0
"""Replicas at most double at a time: a new one takes a while to load, and then takes load from the others."""
BUSY_SHARE = 0.7
"""A replica is given up only if the others' places stay emptier than this."""
QUEUE_S, IN_FLIGHT, PLACES = "queue_s", "in_flight", "places"
"""What a replica reports: the longest wait for a first token in its queue, its requests, and its batch's places."""


def wanted_replicas(
    replicas: int, queue_s: Sequence[float], in_flight: Sequence[float], places: int, target_queue_s: float
) -> int:
    """The number of replicas to have.

    queue_s: seconds that the oldest queued request of each replica has waited, 0 without one. in_flight: requests of
    each replica. places: sequences that one replica computes at once.
    """
    longest_s = max(queue_s, default=0.0)
    if longest_s > target_queue_s:
        return math.ceil(replicas * min(MOST_GROWTH, longest_s / target_queue_s))
    if longest_s == 0 and sum(in_flight) <= BUSY_SHARE * places * (replicas - 1):
        return max(1, replicas - 1)
    return replicas
