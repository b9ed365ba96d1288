"""The number of replicas by what they report."""

from __future__ import annotations

import pytest

from moe_serve.scale.autoscaling import wanted_replicas


@pytest.mark.parametrize(
    ("replicas", "queue_s", "in_flight", "wanted"),
    [
        (2, [0.0, 3.0], [8, 8], 3),  # 1.5 times the target
        (2, [0.0, 60.0], [8, 8], 4),  # twice as many at most
        (2, [1.0, 0.5], [8, 8], 2),  # a short queue
        (2, [2.0, 0.0], [8, 8], 2),  # at the target, not above
        (3, [0.0, 0.0, 0.0], [2, 2, 2], 2),  # two can take 6 of their 16 places
        (3, [0.0, 0.0, 0.0], [4, 4, 4], 3),  # 12 are more than 0.7 of 16
        (3, [0.1, 0.0, 0.0], [0, 0, 0], 3),  # something waits
        (1, [0.0], [0], 1),
        (1, [], [], 1),  # nothing was reported yet
    ],
)
def test_wanted(replicas: int, queue_s: list[float], in_flight: list[float], wanted: int) -> None:
    assert wanted_replicas(replicas, queue_s, in_flight, places=8, target_queue_s=2.0) == wanted
