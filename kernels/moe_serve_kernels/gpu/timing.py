"""Timing work on a GPU as a decode step meets it: captured in one graph, over several layers, with a cold L2 cache.

A graph removes the cost of launching from Python, as serving does; rotating over layers whose weights together exceed
the L2 cache several times keeps any one layer's out of it. Knows no kernels.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

WARM_UP = 3
REPLAYS = 15


def capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """One graph of all calls, in order. What they launch must have been compiled, which happens here as well."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def seconds_per_call(calls: Sequence[Callable[[], object]]) -> float:
    """Median over graph replays of the time of all `calls`, divided by their number."""
    return seconds_of(capture(calls).replay) / len(calls)


def seconds_of(work: Callable[[], object], replays: int = REPLAYS) -> float:
    """Median time of `work` on the current stream."""
    for _ in range(WARM_UP):
        work()
    return statistics.median(once(work) for _ in range(replays))


def once(work: Callable[[], object]) -> float:
    """Seconds of `work` on the current stream, once."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
