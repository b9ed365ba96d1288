"""Engine over a fake runner: text, stop strings, aborts and failures, and nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moe_serve.config import EngineConfig
from moe_serve.engine.engine import Engine
from moe_serve.errors import ContextTooLongError, InvalidRequestError
from moe_serve.scheduling.batch_plan import BatchPlan, StepError, StepResult
from moe_serve.scheduling.finish import FinishedStats, FinishReason
from moe_serve.scheduling.sequence import Request, SampleOutput, SamplingParams
from moe_serve.scheduling.stats import EngineLoad, StepStats
from moe_serve.spec import ModelSpec
from moe_serve.text.tokenizer import Tokenizer
from tests.random_model import DenseRunner

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class AlphabetRunner(DenseRunner):
    """A model that always continues the alphabet: after `c` comes `d`."""

    def __init__(self) -> None:
        super().__init__()
        self.config = EngineConfig.of(num_kv_pages=32, max_model_len=60, page_size=4, max_num_seqs=4)
        self.fails = False
        self.broken_requests: set[str] = set()

    def run(self, plan: BatchPlan) -> StepResult:
        if self.fails:
            raise RuntimeError("the device fell off")
        ids = tuple((s.seq.token_ids[-1] + 1) % 26 for s in plan.scheduled if s.needs_sample)
        failing = [s.seq for s in plan.scheduled if s.seq.request.request_id in self.broken_requests]
        return StepResult(ids, tuple(None for _ in ids), dict.fromkeys(failing, StepError("bad bytes")))

    def close(self) -> None:
        """Nothing to stop."""


@pytest.fixture
def engine() -> Engine:
    backend = FastTokenizer(models.WordLevel({c: i for i, c in enumerate(LETTERS)}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    spec = ModelSpec("fake", torch.float32, 26, 60, 1, 8, 2, 1, 8, 8)
    return Engine(AlphabetRunner(), tokenizer, spec, frozenset())


def runner_of(engine: Engine) -> AlphabetRunner:
    assert isinstance(engine.runner, AlphabetRunner)
    return engine.runner


def add(engine: Engine, prompt: str, request_id: str = "r", **params: Any) -> None:
    ids = tuple(LETTERS.index(c) for c in prompt)
    engine.add_request(Request(request_id, ids, SamplingParams(**params)))


def finish(engine: Engine) -> dict[tuple[str, int], list[SampleOutput]]:
    outputs: dict[tuple[str, int], list[SampleOutput]] = {}
    while engine.has_work():
        for output in engine.step():
            outputs.setdefault((output.request_id, output.index), []).append(output)
        engine.check_integrity()
    return outputs


def test_text_ids_and_counts_add_up(engine: Engine) -> None:
    add(engine, "abc", max_tokens=4)
    outputs = finish(engine)["r", 0]
    assert "".join(o.text for o in outputs) == "defg"
    assert [t for o in outputs for t in o.token_ids] == [3, 4, 5, 6]
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert (outputs[-1].num_prompt_tokens, outputs[-1].num_output_tokens) == (3, 4)


def test_a_stop_string_cuts_the_text_and_ends_the_sample(engine: Engine) -> None:
    add(engine, "a", max_tokens=20, stop=("ef",))
    outputs = finish(engine)["r", 0]
    assert "".join(o.text for o in outputs) == "bcd"
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == (FinishReason.STOP, "ef")
    assert outputs[-1].num_output_tokens == 5


def test_text_held_back_for_a_stop_string_comes_out_at_the_end(engine: Engine) -> None:
    add(engine, "a", max_tokens=4, stop=("defgh",))
    assert "".join(o.text for o in finish(engine)["r", 0]) == "bcde"


def test_all_samples_of_a_request_finish(engine: Engine) -> None:
    add(engine, "abcdefghi", n=3, max_tokens=2)
    outputs = finish(engine)
    assert {key: "".join(o.text for o in value) for key, value in outputs.items()} == {("r", i): "jk" for i in range(3)}


def test_abort_frees_everything_at_once(engine: Engine) -> None:
    add(engine, "abc", "goes", n=2, max_tokens=50)
    add(engine, "abc", "stays", max_tokens=3)
    engine.step()
    engine.abort("goes")
    engine.abort("never existed")
    engine.check_integrity()
    assert set(finish(engine)) == {("stays", 0)}
    assert engine.pool.num_free == engine.num_pages


def test_a_failed_step_ends_the_running_and_spares_the_waiting(engine: Engine) -> None:
    for i in range(6):
        add(engine, "ab", f"r{i}", max_tokens=3)
    engine.step()
    runner_of(engine).fails = True
    with pytest.raises(RuntimeError):
        engine.step()
    failed = engine.fail_running("it broke")
    engine.check_integrity()
    assert [o.finish_reason for o in failed] == [FinishReason.ERROR] * 4
    assert {str(o.error) for o in failed} == {"it broke"}
    runner_of(engine).fails = False
    assert set(finish(engine)) == {("r4", 0), ("r5", 0)}


def test_impossible_requests_are_refused_naming_the_field(engine: Engine) -> None:
    refused: tuple[tuple[tuple[int, ...], dict[str, Any], str], ...] = (
        ((), {}, "prompt"),
        ((26,), {}, "prompt"),
        ((1,), {"logit_bias": {99: 1.0}}, "logit_bias"),
        ((1,), {"stop_token_ids": (26,)}, "stop_token_ids"),
    )
    for prompt, params, param in refused:
        with pytest.raises(InvalidRequestError) as caught:
            engine.check_request(Request("r", prompt, SamplingParams(**params)))
        assert caught.value.param == param
    too_long: tuple[tuple[tuple[int, ...], int | None, str], ...] = (
        ((1,) * 60, None, "prompt"),
        ((1, 2), 59, "max_tokens"),
    )
    for prompt, max_tokens, param in too_long:
        with pytest.raises(ContextTooLongError) as too_long_error:
            engine.check_request(Request("r", prompt, SamplingParams(max_tokens=max_tokens)))
        assert too_long_error.value.param == param


def test_without_max_tokens_a_sample_runs_to_the_end_of_the_context(engine: Engine) -> None:
    add(engine, "abc")
    assert finish(engine)["r", 0][-1].num_output_tokens == 57


class LoadLog:
    """A StatsObserver that keeps the newest load."""

    load: EngineLoad | None = None

    def on_load(self, load: EngineLoad) -> None:
        self.load = load

    def on_step(self, stats: StepStats) -> None: ...

    def on_finished(self, stats: FinishedStats) -> None: ...

    num_aborted = 0

    def on_aborted(self, num_samples: int) -> None:
        self.num_aborted += num_samples


def test_an_abort_shows_in_the_reported_load_at_once(engine: Engine) -> None:
    engine.observer = log = LoadLog()
    add(engine, "abc", max_tokens=50)
    engine.step()
    assert log.load is not None
    assert (log.load.num_running, log.load.kv_usage_frac) == (1, 1 / 32)
    engine.abort("r")
    assert (log.load.num_running, log.load.num_waiting, log.load.kv_usage_frac) == (0, 0, 0.0)
    assert log.num_aborted == 1
    engine.abort("r")
    assert log.num_aborted == 1


def test_a_sequence_with_worthless_results_ends_alone(engine: Engine) -> None:
    add(engine, "abcdefghi", "good", max_tokens=6)
    add(engine, "abcdefghi", "bad", max_tokens=6)
    runner_of(engine).broken_requests.add("bad")
    outputs = finish(engine)
    assert "".join(o.text for o in outputs["good", 0]) == "jklmno"
    assert [(o.finish_reason, str(o.error), o.token_ids) for o in outputs["bad", 0]] == [
        (FinishReason.ERROR, "bad bytes", ())
    ]


def test_pages_of_worthless_results_are_never_shared(engine: Engine) -> None:
    runner_of(engine).broken_requests.add("bad")
    add(engine, "abcdefghijklm", "bad", max_tokens=2)
    finish(engine)
    add(engine, "abcdefghijklm", "next", max_tokens=2)
    assert finish(engine)["next", 0][0].num_cached_tokens == 0
