"""Averages over the past and values of the future, against loops written out."""

from __future__ import annotations

import numpy as np
import pytest

from predictors.averages import next_use_values, past_averages
from predictors.context import BACK, Context, Evidence, window_of
from predictors.predictor import RouterShape
from predictors.streams import UNKNOWN
from predictors.trace import RoutingTrace, offsets_of


@pytest.fixture
def trace() -> RoutingTrace:
    ids = np.argsort(np.random.default_rng(0).random((60, 12, 4)), axis=2)[:, :, :2]
    return RoutingTrace(ids, offsets_of([25, 35]), np.arange(12, dtype=np.int32), 4)


def test_next_use_values_fall_with_distance(small_trace: RoutingTrace) -> None:
    values = next_use_values(small_trace, 0.5)
    # Layer 0 of the first sequence uses {0, 1}, {1, 2}, {2, 3}.
    np.testing.assert_allclose(values[0, 0], [0, 1, 1, 0.5])
    np.testing.assert_allclose(values[2], 0)


def test_streams_average_as_traces_do(trace: RoutingTrace) -> None:
    """The running context and the one that is fitted to are the same."""
    context, stream = Context(RouterShape(tuple(range(12)), 4, 2)), np.array([3])
    context.begin(stream)
    for n in range(25):
        context.step(stream)
        for layer in range(12):
            found = context.averages(layer, stream)[0]
            for rate, average in zip((0.8, 0.98), found, strict=True):
                np.testing.assert_allclose(average, past_averages(trace, rate)[n, layer], atol=1e-6)
            context.observe(layer, stream, trace.ids[n : n + 1, layer])


def test_windows_hold_what_is_known() -> None:
    assert window_of(3, UNKNOWN, 5).current == ()
    assert window_of(3, 1, 5).current == (0, 1)
    assert len(window_of(20, 15, 30).current) == BACK
    assert max(window_of(20, 15, 30).current) == 15
    assert all(0 <= layer < 5 for layer in window_of(4, 3, 5).previous + window_of(0, UNKNOWN, 5).previous)


def test_a_fit_is_least_squares(trace: RoutingTrace) -> None:
    """Counted in bands and put together, it solves the same equations as the evidence written out."""
    layer, newest = 10, 9
    window = window_of(layer, newest, 12)
    evidence = Evidence(trace)
    (linear,) = evidence.fit([window], [evidence.used(layer)])[0]
    context, stream = Context(RouterShape(tuple(range(12)), 4, 2)), np.array([0])
    forecasts = []
    for n in range(60):
        if n in (0, 25):
            context.begin(stream)
        context.step(stream)
        for below in range(newest + 1):
            context.observe(below, stream, trace.ids[n : n + 1, below])
        forecasts.append(linear.forecast(context, stream)[0])
        for above in range(layer, 12):
            context.observe(above, stream, trace.ids[n : n + 1, above])
    used = evidence.used(layer)
    residual = used - np.array(forecasts)
    # The bias is not shrunk, so residuals average to nothing; and the fit explains more than the mean does.
    np.testing.assert_allclose(residual.mean(axis=0), 0, atol=2e-3)
    assert (residual**2).sum() < ((used - used.mean(axis=0)) ** 2).sum()
