"""A small trace, made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from predictors.trace import RoutingTrace


@pytest.fixture
def small_trace() -> RoutingTrace:
    """5 tokens in 2 sequences, layers 1 and 3 of a model, 4 experts, top-2."""
    ids = np.array([[[0, 1], [3, 2]], [[1, 2], [0, 2]], [[2, 3], [1, 0]], [[3, 0], [2, 1]], [[0, 2], [3, 1]]])
    weights = np.tile(np.array([0.75, 0.25], dtype=np.float32), (5, 2, 1))
    return RoutingTrace(ids, np.array([0, 3, 5]), np.array([1, 3]), 4, weights, {"model": "tiny"}, "small.npz")
