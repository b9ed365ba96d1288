"""Grammars through the real engine and sampler: output stays inside, ends, and mixes with everything else."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator

import jsonschema
import numpy as np
import pytest

from moe_serve.demo import MODEL
from moe_serve.engine.engine import Engine
from moe_serve.errors import InvalidRequestError, OverloadedError
from moe_serve.grammars.grammar_process import STEP_S
from moe_serve.grammars.matcher import Matcher
from moe_serve.scheduling.finish import FinishReason
from moe_serve.scheduling.sequence import GrammarKind, GrammarSpec, Request, SampleOutput, SamplingParams, Sequence
from moe_serve.text.tokenizer import Tokenizer
from tests.grammars.walking import hold_up
from tests.random_model import random_engine, run_all

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["mouse", "cat"]},
        "ages": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 4},
    },
    "required": ["name", "kind", "ages"],
    "additionalProperties": False,
}
AS_JSON = GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA), "response_format")


def regex(text: str) -> GrammarSpec:
    return GrammarSpec(GrammarKind.REGEX, text, "structured_outputs")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_path(str(MODEL))


@pytest.fixture
def engine(tokenizer: Tokenizer) -> Iterator[Engine]:
    engine = random_engine(tokenizer)
    yield engine
    engine.close()


def text_of(outputs: list[SampleOutput]) -> str:
    return "".join(o.text for o in outputs)


def test_noise_becomes_json_of_the_schema(engine: Engine) -> None:
    requests = {str(i): SamplingParams(grammar=AS_JSON, seed=i, max_tokens=300) for i in range(8)}
    for outputs in run_all(engine, requests).values():
        assert outputs[-1].finish_reason is FinishReason.STOP
        jsonschema.validate(json.loads(text_of(outputs)), SCHEMA)


def test_regex_and_grammars_are_followed(engine: Engine) -> None:
    lark = GrammarSpec(GrammarKind.LARK, 'start: "a" NUM\nNUM: /[0-9]{2,3}/')
    gbnf = GrammarSpec(GrammarKind.GBNF, 'root ::= "yes" | "no"')
    specs = {r"[ab]{3,5}c": regex(r"[ab]{3,5}c"), r"a[0-9]{2,3}": lark, "yes|no": gbnf}
    outputs = run_all(engine, {k: SamplingParams(grammar=v, max_tokens=40) for k, v in specs.items()})
    for (pattern, _), produced in outputs.items():
        assert produced[-1].finish_reason is FinishReason.STOP
        assert re.fullmatch(pattern, text_of(produced))


def test_a_complete_grammar_leaves_only_the_end_even_before_min_tokens(engine: Engine) -> None:
    (outputs,) = run_all(engine, {"r": SamplingParams(grammar=regex("cat"), min_tokens=30, max_tokens=50)}).values()
    assert text_of(outputs) == "cat"
    assert outputs[-1].finish_reason is FinishReason.STOP
    (outputs,) = run_all(engine, {"r": SamplingParams(grammar=regex("[a-c]+"), min_tokens=30, max_tokens=50)}).values()
    assert outputs[-1].num_output_tokens >= 30, "where the grammar leaves a choice, min_tokens holds"


def test_the_grammar_wins_over_what_leaves_it_no_token(engine: Engine, tokenizer: Tokenizer) -> None:
    (dog,) = tokenizer.encode("d", add_special_tokens=False)
    params = SamplingParams(grammar=regex("cat"), allowed_token_ids=(dog,), temperature=0, max_tokens=9)
    (outputs,) = run_all(engine, {"r": params}).values()
    assert text_of(outputs) == "cat"


def test_samples_logprobs_stop_and_free_requests_in_one_batch(engine: Engine) -> None:
    requests = {
        "n": SamplingParams(n=3, grammar=AS_JSON, seed=1, max_tokens=300, logprobs=2),
        "stop": SamplingParams(grammar=regex("aaa[xyz]{8}"), stop=("aaa",), max_tokens=40),
        "free": SamplingParams(max_tokens=20, ignore_eos=True, temperature=0),
    }
    alone = run_all(engine, {"free": requests["free"]})
    outputs = run_all(engine, requests)
    texts = {text_of(outputs["n", i]) for i in range(3)}
    assert len(texts) == 3, "each sample has a state of its own"
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert all(len(o.logprobs) == 1 and len(o.logprobs[0].top) == 2 for o in outputs["n", 0])
    assert text_of(outputs["stop", 0]) == ""
    assert outputs["stop", 0][-1].stop_reason == "aaa"
    assert text_of(outputs["free", 0]) == text_of(alone["free", 0])


def test_preemption_and_the_prefix_cache_change_nothing(tokenizer: Tokenizer) -> None:
    requests = {str(i): SamplingParams(grammar=AS_JSON, seed=i, max_tokens=120) for i in range(3)}
    roomy, tight = random_engine(tokenizer), random_engine(tokenizer, num_kv_pages=18, max_model_len=140)
    expected, got = run_all(roomy, requests), run_all(tight, requests)
    assert {k: text_of(v) for k, v in got.items()} == {k: text_of(v) for k, v in expected.items()}
    for engine in (roomy, tight):
        engine.close()


@pytest.mark.parametrize(
    "spec",
    [
        GrammarSpec(GrammarKind.JSON_SCHEMA, '{"type": "objct"}', "response_format"),
        GrammarSpec(GrammarKind.JSON_SCHEMA, "no json", "response_format"),
        GrammarSpec(GrammarKind.JSON_SCHEMA, "[" * 5000 + "]" * 5000, "response_format"),
        GrammarSpec(GrammarKind.JSON_SCHEMA, '{"$ref": "https://example.com/x"}', "response_format"),
        GrammarSpec(GrammarKind.JSON_SCHEMA, '{"type": "integer", "minimum": 5, "maximum": 3}', "response_format"),
        GrammarSpec(GrammarKind.JSON_SCHEMA, '{"type": "integer", "multipleOf": 1000000}', "response_format"),
        GrammarSpec(GrammarKind.JSON_SCHEMA, '{"type": "number", "multipleOf": 1.0000003}', "response_format"),
        GrammarSpec(
            GrammarKind.JSON_SCHEMA, '{"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}', "response_format"
        ),
        GrammarSpec(GrammarKind.LARK, 'start: %json {"type": "integer", "multipleOf": 1000003}', "guided_grammar"),
        GrammarSpec(GrammarKind.REGEX, "(a", "guided_regex"),
        GrammarSpec(GrammarKind.REGEX, "(" * 5000, "guided_regex"),
        GrammarSpec(GrammarKind.LARK, "start: nothing", "structured_outputs"),
        GrammarSpec(GrammarKind.LARK, "", "structured_outputs"),
    ],
)
def test_a_grammar_that_cannot_be_compiled_is_refused_by_its_field(engine: Engine, spec: GrammarSpec) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        run_all(engine, {"r": SamplingParams(grammar=spec)})
    assert caught.value.param == spec.param
    assert not engine.has_work()


def test_ignore_eos_is_refused_with_a_grammar() -> None:
    with pytest.raises(InvalidRequestError, match="ignore_eos"):
        SamplingParams(grammar=AS_JSON, ignore_eos=True)


def test_a_grammar_that_exhausts_its_limits_ends_its_own_request_only(engine: Engine) -> None:
    engine.add_request(make_request("hard", SamplingParams(grammar=regex("a+"), max_tokens=5)))
    engine.add_request(make_request("easy", SamplingParams(max_tokens=5, ignore_eos=True)))
    (hard,) = (s for s in engine.scheduler.live() if s.request.request_id == "hard")
    make_wrong_move(hard, engine.spec.vocab_size)
    outputs = [o for _ in range(5) for o in engine.step()]
    (failed,) = (o for o in outputs if o.request_id == "hard")
    assert isinstance(failed.error, InvalidRequestError), "the request's own fault"
    assert failed.error.param == "structured_outputs"
    assert "could not be followed further than 0 tokens" in failed.error.message
    assert sum(o.request_id == "easy" for o in outputs) == 5
    engine.check_integrity()


def make_wrong_move(seq: Sequence, vocab_size: int) -> None:
    """Leave its matcher in the state that llguidance's limits leave one in."""
    assert isinstance(seq.matcher, Matcher)
    assert seq.matcher.begin(STEP_S)
    number, _ = seq.matcher.next_row(seq)
    masks = np.zeros((1, -(-vocab_size // 32)), np.int32)
    seq.matcher.process().ask([(number, [0])], masks.shape[1])
    assert list(seq.matcher.process().hear(masks)) == [0], "the move is wrong"


def make_request(request_id: str, params: SamplingParams) -> Request:
    return Request(request_id, (5, 6, 7), params)


def test_a_late_mask_holds_up_no_other_and_changes_no_token(engine: Engine) -> None:
    hard = SamplingParams(grammar=regex("[ab]{12}c"), seed=3, max_tokens=40)
    easy = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0)
    alone = run_all(engine, {"hard": hard, "easy": easy})
    engine.add_request(make_request("hard", hard))
    engine.add_request(make_request("easy", easy))
    (seq,) = (s for s in engine.scheduler.live() if s.request.request_id == "hard")
    outputs = [o for _ in range(4) for o in engine.step()]
    assert isinstance(seq.matcher, Matcher)
    pid = seq.matcher.process().pid
    hold_up(pid)
    start_s = time.monotonic()
    held = [o for _ in range(6) for o in engine.step()]
    assert time.monotonic() - start_s < STEP_S, "no step waits for it until its process is ended"
    assert [o.request_id for o in held] == ["easy"] * 6
    engine.check_integrity()
    os.kill(pid, signal.SIGCONT)
    while engine.has_work():
        held += engine.step()
    for name, expected in alone.items():
        assert text_of([o for o in outputs + held if o.request_id == name[0]]) == text_of(expected)


def test_a_process_that_the_system_ends_is_no_fault_of_the_request(engine: Engine) -> None:
    engine.add_request(make_request("r", SamplingParams(grammar=regex("a{30}"), max_tokens=40)))
    (seq,) = engine.scheduler.live()
    while not any(o.request_id == "r" for o in engine.step()):
        pass
    assert isinstance(seq.matcher, Matcher)
    os.kill(seq.matcher.process().pid, signal.SIGKILL)
    outputs = []
    while engine.has_work():
        outputs += engine.step()
    assert isinstance(outputs[-1].error, OverloadedError)
