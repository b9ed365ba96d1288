"""What every method promises, from inside or outside: probabilities, no peeking, streams kept apart, one result."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from predictors import predictor as base
from predictors.evaluation import show
from predictors.methods import find_method, method_names
from predictors.predictor import FUTURE, HIDDEN, Foresight, Predictor, Training, as_probabilities, inclusion
from predictors.trace import RoutingTrace, offsets_of

from ..laws import laws_of

L, E, K, H, V = 4, 8, 2, 6, 20
METHODS = method_names()
law = laws_of(base)


def sticky_trace(lengths: tuple[int, ...] = (15, 9, 16), seed: int = 0) -> RoutingTrace:
    """The last token's experts are chosen more often."""
    rng = np.random.default_rng(seed)
    ids = np.empty((sum(lengths), L, K), dtype=np.uint8)
    recent = np.zeros((L, E))
    for n in range(len(ids)):
        ids[n] = np.argsort(-(recent + rng.gumbel(size=(L, E))), axis=1)[:, :K]
        recent *= 0.5
        np.put_along_axis(recent, ids[n].astype(int), 2.0, axis=1)
    weights = rng.random(ids.shape, dtype=np.float32)
    tokens = rng.integers(0, V, len(ids)).astype(np.int32)
    return RoutingTrace(ids, offsets_of(lengths), np.arange(L, dtype=np.int32), E, weights, token_ids=tokens)


def training(trace: RoutingTrace) -> Training:
    rng = np.random.default_rng(5)
    routers = [(rng.normal(size=(E, H)).astype(np.float32), None) for _ in range(L)]
    return Training(trace, routers)


@pytest.fixture(scope="module")
def fitted() -> dict[str, Predictor]:
    return {name: find_method(name).fit(training(sticky_trace(seed=1))) for name in METHODS}


@pytest.fixture(params=METHODS)
def predictor(request: pytest.FixtureRequest, fitted: dict[str, Predictor]) -> Predictor:
    return fitted[request.param]


Forecasts = npt.NDArray[Any]


def hidden_of(trace: RoutingTrace) -> npt.NDArray[np.float32]:
    """[N, L, H], from the ids, so that equal routes have equal hidden states."""
    vectors = np.random.default_rng(3).normal(size=(E, H)).astype(np.float32)
    return np.asarray(vectors[trace.ids].sum(axis=2))


def forecasts(
    predictor: Predictor, trace: RoutingTrace, rows_of: list[range], streams: list[int] | None = None
) -> list[Forecasts]:
    """For each sequence [tokens, every (newest, layer) pair, E]; sequences of one call are of equal length."""
    numbers = np.array(streams or range(len(rows_of)))
    hidden = hidden_of(trace)
    predictor.begin(numbers)
    if FUTURE in predictor.needs:
        for stream, rows in zip(numbers.tolist(), rows_of, strict=True):
            predictor.reveal(stream, part(trace, rows))  # type: ignore[attr-defined]
    found = []
    for n in range(len(rows_of[0])):
        newest = np.array([r[n] for r in rows_of])
        predictor.step(numbers, None if trace.token_ids is None else trace.token_ids[newest])
        found.append(one_token(predictor, trace, numbers, newest, hidden))
    return list(np.array(found).transpose(2, 0, 1, 3))


def one_token(
    predictor: Predictor, trace: RoutingTrace, numbers: npt.NDArray[Any], rows: npt.NDArray[Any], hidden: Any
) -> Forecasts:
    """[pairs, T, E]."""
    found = []
    for newest in range(-1, L):
        if newest >= 0:
            show(predictor, trace, newest, numbers, rows, hidden)
            if isinstance(predictor, Foresight):
                found.append(predictor.upcoming(newest, numbers))
        found += [predictor.probabilities(layer, numbers) for layer in range(newest + 1, L)]
    return np.array(found)


def part(trace: RoutingTrace, rows: range) -> RoutingTrace:
    return RoutingTrace(trace.ids[rows], offsets_of([len(rows)]), trace.layer_ids, trace.num_experts)


SEQUENCES = [range(0, 9), range(15, 24), range(24, 33)]


@law(1)
def test_probabilities_are_probabilities(predictor: Predictor) -> None:
    trace = sticky_trace()
    predictor.begin(np.array([0]))
    predictor.step(np.array([0]), trace.token_ids[:1] if trace.token_ids is not None else None)
    if FUTURE in predictor.needs:
        predictor.reveal(0, part(trace, range(0, 9)))  # type: ignore[attr-defined]
    for found in forecasts(predictor, trace, SEQUENCES):
        assert np.isfinite(found).all()
        assert ((found >= 0) & (found <= 1)).all()


@law(2)
def test_rows_sum_to_the_number_of_choices(predictor: Predictor) -> None:
    trace, streams = sticky_trace(), np.array([2])
    predictor.begin(streams)
    if FUTURE in predictor.needs:
        predictor.reveal(2, part(trace, range(0, 9)))  # type: ignore[attr-defined]
    for n in range(9):
        predictor.step(streams, np.array([3]))
        for layer in range(L):
            total = float(predictor.probabilities(layer, streams).sum())
            assert 0.85 * K <= total <= K + 1e-3, (n, layer)
            show(predictor, trace, layer, streams, np.array([n]), hidden_of(trace))


@law(3)
def test_no_peeking(predictor: Predictor) -> None:
    """Another ending changes nothing before it."""
    trace = sticky_trace()
    ids = trace.ids.copy()
    ids[5:9] = np.sort((ids[5:9] + 3) % E, axis=2)
    other = replace(trace, ids=ids)
    one, two = (forecasts(predictor, t, SEQUENCES[:1])[0] for t in (trace, other))
    cut = forecasts(predictor, trace, [range(0, 5)])[0]
    if FUTURE in predictor.needs:
        assert not np.array_equal(one[:5], two[:5])  # it is told what comes
    else:
        np.testing.assert_array_equal(one[:5], two[:5])
        np.testing.assert_array_equal(one[:5], cut)


@law(4)
def test_a_stream_begun_again_has_forgotten(predictor: Predictor) -> None:
    trace = sticky_trace()
    fresh = forecasts(predictor, trace, SEQUENCES[1:2], [7])[0]
    forecasts(predictor, trace, SEQUENCES[:1], [7])
    np.testing.assert_array_equal(forecasts(predictor, trace, SEQUENCES[1:2], [7])[0], fresh)


@law(5)
def test_together_is_as_alone_and_again(predictor: Predictor) -> None:
    trace = sticky_trace()
    alone = [forecasts(predictor, trace, [rows], [4])[0] for rows in SEQUENCES]
    for streams in ([0, 1, 2], [9, 3, 5], [9, 3, 5]):
        together = forecasts(predictor, trace, SEQUENCES, streams)
        for one, other in zip(alone, together, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
@law(6)
def test_arrays_hold_everything_that_was_learnt(fitted: dict[str, Predictor], name: str) -> None:
    trace, one = sticky_trace(), fitted[name]
    two = find_method(name).from_arrays(training(trace).shape, one.arrays())
    # Files hold half precision.
    np.testing.assert_allclose(
        forecasts(one, trace, SEQUENCES)[1], forecasts(two, trace, SEQUENCES)[1], atol=0.02, rtol=0.02
    )


@pytest.mark.parametrize("name", METHODS)
@law(7)
def test_training_again_gives_the_same(fitted: dict[str, Predictor], name: str) -> None:
    again = find_method(name).fit(training(sticky_trace(seed=1)))
    for key, array in fitted[name].arrays().items():
        np.testing.assert_array_equal(array, again.arrays()[key])


@law(8)
def test_needs_are_known_ones(predictor: Predictor) -> None:
    assert predictor.needs <= {FUTURE, HIDDEN, "token ids"}


def test_unknown_methods_are_named() -> None:
    with pytest.raises(ValueError, match="'magic' is not one of frequency"):
        find_method("magic")


@pytest.mark.parametrize("top_k", [1, 2, 7, 8])
def test_inclusion_keeps_the_order_and_sums_to_k(top_k: int) -> None:
    scores = np.random.default_rng(0).exponential(size=(50, 8)) ** 6
    found = inclusion(scores, top_k)
    np.testing.assert_allclose(found.sum(axis=1), top_k, rtol=1e-3)
    if top_k < 8:
        best = found[np.arange(50), scores.argmax(axis=1)]
        assert (best >= found.max(axis=1) - 1e-6).all()


def test_estimates_become_probabilities() -> None:
    found = as_probabilities(np.array([[1.5, 0.5, 0.2, -0.2]]), 2)
    assert found.sum() <= 2
    assert found.min() == 0
    assert found.max() <= 1
