"""What the front and the ranks say: nothing is lost on the way. No processes, no torch."""

from __future__ import annotations

import dataclasses
import json
import socket

import pytest

from moe_serve.errors import ConfigError
from moe_serve.parallel.config import ParallelConfig
from moe_serve.parallel.front.links import Listener
from moe_serve.parallel.wire.channel import Channel, ChannelClosed
from moe_serve.parallel.wire.environment import FRONT, front_address, read_place
from moe_serve.parallel.wire.messages import (
    StepReader,
    StepWriter,
    merge_results,
    params_from_json,
    params_to_json,
    result_to_json,
)
from moe_serve.scheduling.batch_plan import BatchPlan, ScheduledSequence
from moe_serve.scheduling.finish import FinishReason
from moe_serve.scheduling.sequence import (
    GrammarKind,
    GrammarSpec,
    Request,
    SamplingParams,
    Sequence,
    TokenLogprob,
)


def test_params_survive() -> None:
    grammar = GrammarSpec(GrammarKind.REGEX, "[ab]+", "guided_regex")
    params = SamplingParams(
        temperature=0.5, logit_bias={7: -3.0}, stop=("a", "b"), seed=5, logprobs=2, n=3,
        bad_words=((1, 2), (3,)), allowed_token_ids=(4, 5), grammar=grammar,
    )  # fmt: skip
    again = params_from_json(json.loads(json.dumps(params_to_json(params))))
    for field in dataclasses.fields(params):
        assert getattr(again, field.name) == getattr(params, field.name), field.name


def no_grammar(spec: GrammarSpec) -> object:
    raise AssertionError("no sequence has a grammar")


def test_mirrors_follow_the_front() -> None:
    seq = Sequence(Request("r", (1, 2, 3), SamplingParams(temperature=0)), 0, [1, 2, 3], 10, page_ids=[4])
    seq.home_rank = 1
    writer, reader = StepWriter(), StepReader(no_grammar)
    first = BatchPlan((ScheduledSequence(seq, 0, 3),))
    step = reader.read(json.loads(json.dumps(writer.write(first))))
    assert step.plan.scheduled[0].needs_sample
    assert step.part_of(1) == [0]
    seq.token_ids.append(9)
    seq.num_computed = 3
    step = reader.read(json.loads(json.dumps(writer.write(BatchPlan((ScheduledSequence(seq, 3, 1),))))))
    assert step.plan.scheduled[0].seq.token_ids == [1, 2, 3, 9]
    assert step.homes == (1,)
    seq.finish_reason = FinishReason.STOP
    assert writer.write(BatchPlan(()))["gone"] == [0]


def test_a_mirror_has_a_matcher_of_its_own() -> None:
    grammar = GrammarSpec(GrammarKind.REGEX, "a")
    seq = Sequence(Request("r", (1,), SamplingParams(grammar=grammar)), 0, [1], 5, page_ids=[0])
    message = StepWriter().write(BatchPlan((ScheduledSequence(seq, 0, 1),)), routes=1)
    step = StepReader(lambda spec: ("matcher of", spec)).read(json.loads(json.dumps(message)))
    assert step.plan.scheduled[0].seq.matcher == ("matcher of", grammar)
    assert step.routes == 1


def test_results_of_several_ranks_merge_in_plan_order() -> None:
    seqs = [Sequence(Request(f"{i}", (1,), SamplingParams()), 0, [1], 5) for i in range(3)]
    plan = BatchPlan(tuple(ScheduledSequence(seq, 0, 1) for seq in seqs))
    logprob = TokenLogprob(8, -0.25, ((8, -0.25), (2, -3.0)))
    answers = [result_to_json({2: (7, None)}, {}), result_to_json({0: (8, logprob), 1: (6, None)}, {1: "lost"})]
    result = merge_results(plan, json.loads(json.dumps(answers)))
    assert result.token_ids == (8, 6, 7)
    assert result.logprobs == (logprob, None, None)
    assert result.errors == {seqs[1]: "lost"}


def test_channel_ends_when_the_other_side_does() -> None:
    left, right = (Channel(end) for end in socket.socketpair())
    left.send({"a": [1, 2]})
    assert right.receive(1.0) == {"a": [1, 2]}
    with pytest.raises(TimeoutError):
        right.receive(0.01)
    left.close()
    with pytest.raises(ChannelClosed):
        right.receive(1.0)
    right.close()


def test_strangers_are_sent_away() -> None:
    listener = Listener("127.0.0.1", 0, "word")
    try:
        for secret, accepted in (("wrong", False), ("word", True)):
            end = Channel(socket.create_connection(listener.address))
            end.send({"op": "hello", "rank": 1, "pid": 2, "secret": secret})
            link = listener.accept(5.0)
            assert (link is not None) == accepted
            end.close()
            if link is not None:
                link.channel.close()
    finally:
        listener.close()


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
