"""Evaluation: figures that can be worked out by hand, and who is left out."""

from __future__ import annotations

import numpy as np
import pytest

from predictors.evaluation import BEFORE_THE_FIRST, evaluate, run_streams, split_sequences
from predictors.methods.frequency import Frequency
from predictors.methods.oracle import Oracle
from predictors.methods.transition import Transition
from predictors.predictor import RouterShape, Training
from predictors.trace import RoutingTrace, offsets_of


def chained_trace(lengths: tuple[int, ...], seed: int = 0) -> RoutingTrace:
    """5 layers of 8 experts, top-1; layer 0 at random, every later layer uses the expert after the one below."""
    first = np.random.default_rng(seed).integers(0, 8, sum(lengths))
    ids = (first[:, None] + np.arange(5)) % 8
    return RoutingTrace(ids[:, :, None], offsets_of(lengths), np.arange(5, dtype=np.int32), 8)


def test_an_oracle_knows_everything() -> None:
    trace = chained_trace((4, 7, 2, 5))
    scores = evaluate(Oracle(RouterShape(tuple(range(5)), 8, 1)), trace, (1, 3, BEFORE_THE_FIRST), batch=2)
    for distance in scores.distances:
        assert (scores.recall(distance), scores.sure_recall(distance), scores.sure_precision(distance)) == (1, 1, 1)
    assert scores.uses.tolist() == [[0, 18, 18, 18, 18], [0, 0, 0, 18, 18], [18] * 5]
    assert scores.recall_by_layer(3) == [None, None, None, 1.0, 1.0]


def test_transition_learns_a_chain_that_popularity_cannot() -> None:
    train, test = chained_trace((100, 100)), chained_trace((40,), seed=1)
    chain = evaluate(Transition.fit(Training(train)), test, (1, 2, BEFORE_THE_FIRST))
    assert (chain.recall(1), chain.recall(2)) == (1, 1)
    assert chain.recall(BEFORE_THE_FIRST) < 0.5
    assert evaluate(Frequency.fit(Training(train)), test, (1,)).recall(1) < 0.5


def test_every_token_runs_once_in_its_own_stream() -> None:
    trace = chained_trace((4, 1, 3, 2))
    steps = list(run_streams(Oracle(RouterShape(tuple(range(5)), 8, 1)), trace, batch=2))
    assert [rows.tolist() for _, rows in steps] == [[0, 4], [1, 5], [2, 6], [3, 7], [8], [9]]
    assert [streams.tolist() for streams, _ in steps] == [[0, 1]] * 4 + [[0]] * 2


def test_the_split_is_by_sequence_and_seed() -> None:
    trace = chained_trace(tuple(range(1, 11)))
    train, test = split_sequences(trace)
    assert (train.num_sequences, test.num_sequences) == (8, 2)
    assert sorted([*np.diff(train.seq_offsets), *np.diff(test.seq_offsets)]) == list(range(1, 11))
    assert split_sequences(trace)[1].num_tokens == test.num_tokens
    with pytest.raises(ValueError, match="has one sequence"):
        split_sequences(chained_trace((5,)))
