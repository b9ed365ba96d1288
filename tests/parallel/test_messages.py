"""What the front and the ranks say: nothing is lost on the way. No processes, no torch."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from expert_cache.report import ExpertTotals
from moe_serve.config import EngineConfig, ParallelConfig
from moe_serve.errors import ConfigError
from moe_serve.parallel.front.step_writer import StepWriter, merge
from moe_serve.parallel.ranks.step_reader import Startable, StepReader
from moe_serve.parallel.wire.channel import Channel, ChannelClosed
from moe_serve.parallel.wire.environment import FRONT, front_address, read_place
from moe_serve.parallel.wire.messages import (
    ROUTE_IDS,
    Alive,
    Answer,
    Ask,
    Counted,
    Order,
    Outcome,
    Place,
    Start,
    StepDone,
    Stop,
    encode,
    read_front,
    read_rank,
)
from moe_serve.scheduling.batch_plan import BatchPlan, Blame, ScheduledSequence, StepError
from moe_serve.scheduling.finish import FinishReason
from moe_serve.scheduling.sequence import (
    GrammarKind,
    GrammarSpec,
    Request,
    SamplingParams,
    Sequence,
    TokenLogprob,
)
from placement.cost import Layout
from predictors.predictor import RouterShape


def heard_by_a_rank(order: Order) -> Any:
    message = read_front(encode(Ask(1, order)))
    assert isinstance(message, Ask)
    return message.order


def heard_by_the_front(outcome: Outcome) -> Any:
    message = read_rank(encode(Answer(1, outcome)))
    assert isinstance(message, Answer)
    return message.outcome


def no_grammar(spec: GrammarSpec) -> Startable:
    raise AssertionError("no sequence has a grammar")


def test_settings_survive() -> None:
    settings = Start(EngineConfig(model="folder", max_num_seqs=3), ParallelConfig(devices=2, ep_mode="coherent"))
    assert read_front(encode(settings)) == settings


def test_params_survive() -> None:
    grammar = GrammarSpec(GrammarKind.REGEX, "[ab]+", "guided_regex")
    params = SamplingParams(
        temperature=0.5, logit_bias={7: -3.0}, stop=("a", "b"), seed=5, logprobs=2, n=3,
        bad_words=((1, 2), (3,)), allowed_token_ids=(4, 5), grammar=grammar,
    )  # fmt: skip
    seq = Sequence(Request("r", (1,), params), 0, [1], 5, page_ids=[0])
    step = heard_by_a_rank(StepWriter().write(BatchPlan((ScheduledSequence(seq, 0, 1),))))
    assert step.new[0].params == params


@pytest.mark.parametrize("replicas", [np.array([[0, 0, 1]]), np.empty((0, 3), np.int64)])
def test_layouts_survive(replicas: NDArray[np.int64]) -> None:
    layout = Layout(np.array([[0, 0, 1, 1]]), replicas)
    again = heard_by_a_rank(Place(layout)).layout
    assert np.array_equal(again.device_of, layout.device_of)
    assert np.array_equal(again.replicas, layout.replicas)


@pytest.mark.parametrize("raw", [b"", b"\xc1", b"\x91" * 100_000, encode(Stop()), encode(Alive())[:-1]])
def test_what_is_no_message_is_an_error(raw: bytes) -> None:
    with pytest.raises((msgspec.MsgspecError, RecursionError)):
        read_rank(raw)


def test_mirrors_follow_the_front() -> None:
    seq = Sequence(Request("r", (1, 2, 3), SamplingParams(temperature=0)), 0, [1, 2, 3], 10, page_ids=[4])
    seq.home_rank = 1
    writer, reader = StepWriter(), StepReader(no_grammar)
    step = reader.read(heard_by_a_rank(writer.write(BatchPlan((ScheduledSequence(seq, 0, 3),)))))
    assert step.plan.scheduled[0].needs_sample
    assert step.part_of(1) == [0]
    seq.token_ids.append(9)
    seq.num_computed = 3
    step = reader.read(heard_by_a_rank(writer.write(BatchPlan((ScheduledSequence(seq, 3, 1),)))))
    assert step.plan.scheduled[0].seq.token_ids == [1, 2, 3, 9]
    assert step.homes == (1,)
    seq.finish_reason = FinishReason.STOP
    assert writer.write(BatchPlan(())).gone == [0]


@dataclass(frozen=True)
class Matcher:
    """Stands where a grammar's matcher would."""

    spec: GrammarSpec

    def close(self) -> None:
        """Nothing to give back."""

    def begin(self) -> bool:
        return True


def test_a_mirror_has_a_matcher_of_its_own() -> None:
    grammar = GrammarSpec(GrammarKind.REGEX, "a")
    seq = Sequence(Request("r", (1,), SamplingParams(grammar=grammar)), 0, [1], 5, page_ids=[0])
    message = StepWriter().write(BatchPlan((ScheduledSequence(seq, 0, 1),)), routes=ROUTE_IDS)
    step = StepReader(Matcher).read(heard_by_a_rank(message))
    assert step.plan.scheduled[0].seq.matcher == Matcher(grammar)
    assert step.routes == ROUTE_IDS


def test_results_of_several_ranks_merge_in_plan_order() -> None:
    seqs = [Sequence(Request(f"{i}", (1,), SamplingParams()), 0, [1], 5) for i in range(3)]
    plan = BatchPlan(tuple(ScheduledSequence(seq, 0, 1) for seq in seqs))
    logprob = TokenLogprob(8, -0.25, ((8, -0.25), (2, -3.0)))
    counted = Counted({"trips": 1}, [2], ExpertTotals(hits=3))
    answers = [
        StepDone({2: (7, None)}, {}, None, (2,), counted),
        StepDone({0: (8, logprob), 1: (6, None)}, {1: StepError("lost", Blame.GRAMMAR)}, None, (), counted),
    ]
    heard = [heard_by_the_front(answer) for answer in answers]
    assert heard == answers
    result = merge(plan, heard, RouterShape((0,), 4, 2))
    assert result.token_ids == (8, 6, 7)
    assert result.logprobs == (logprob, None, None)
    assert result.errors == {seqs[1]: StepError("lost", Blame.GRAMMAR)}
    assert result.late == {seqs[2]}


def test_channel_ends_when_the_other_side_does() -> None:
    left, right = (Channel(end) for end in socket.socketpair())
    left.send(b"hello")
    assert right.receive(1.0) == b"hello"
    with pytest.raises(TimeoutError):
        right.receive(0.01)
    left.close()
    with pytest.raises(ChannelClosed):
        right.receive(1.0)
    right.close()


def test_place_names_what_is_wrong() -> None:
    good = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "box", "MASTER_PORT": "29500"}
    place = read_place(good)
    assert front_address(place, good) == ("box", 29501)
    assert front_address(place, {**good, FRONT: "other:7"}) == ("other", 7)
    with pytest.raises(ConfigError, match="RANK='x'"):
        read_place({**good, "RANK": "x"})
    with pytest.raises(ConfigError, match="not below WORLD_SIZE"):
        read_place({**good, "RANK": "2"})


@pytest.mark.parametrize("settings", [{"devices": 0}, {"ep_mode": "fast"}, {"expert_plan": "x"}, {"rank_stall_s": 0}])
def test_bad_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="--"):
        ParallelConfig(**settings)  # type: ignore[arg-type]
