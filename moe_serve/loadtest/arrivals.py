"""When requests are sent. Times in seconds from the start; knows nothing of the requests."""

from __future__ import annotations

import itertools
import math
import random


def arrival_times(count: int, rate: float, burstiness: float, rng: random.Random) -> list[float]:
    """Arrival times at a mean rate of `rate` per second, the first at 0; rate inf: all at 0.

    Gaps follow a gamma distribution of shape `burstiness` and mean 1 / rate: 1 is a Poisson
    process, below 1 comes in bursts, above 1 is more even. Example: rate 2, four requests of a
    very even process: about 0, 0.5, 1, 1.5.
    """
    if math.isinf(rate):
        return [0.0] * count
    gaps = (rng.gammavariate(burstiness, 1 / (rate * burstiness)) for _ in range(count - 1))
    return list(itertools.accumulate(gaps, initial=0.0))[:count]
