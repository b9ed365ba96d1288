"""Drafts change how many steps an answer takes, and no bit of it: tokens, log-probabilities, texts and endings.

An oracle knows the answers and spoils some guesses, so that every number of right ones comes up, among many sequences
at once. Prompt lookup itself runs on the demo model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

import moe_serve
from moe_serve import LLM, SamplingParams
from moe_serve.llm import RequestResult
from moe_serve.scheduling.sequence import GrammarKind, GrammarSpec
from moe_serve.scheduling.sequence import Sequence as Seq
from moe_serve_kernels.cpu import library

from .serving import StepLog, host_managed, load

pytestmark = pytest.mark.skipif(library.load() is None, reason="C++ kernels are not built here (no compiler)")

Checkpoint = Callable[[str], Path]
DEMO = Path(moe_serve.__file__).parent / "demo" / "model"
NEW_TOKENS = 24
MODELS = ("mixtral", "qwen3_moe", "deepseek_v2")
WAYS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "logprobs": 3},
    {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "n": 2},
    {"temperature": 0, "repetition_penalty": 1.3, "logprobs": 0},
    {"temperature": 0.9, "presence_penalty": 0.7, "frequency_penalty": 0.4, "min_p": 0.02},
    {"temperature": 1.0, "min_tokens": 20, "stop_token_ids": tuple(range(128)), "logprobs": 1},
    {"temperature": 1.0, "stop_token_ids": tuple(range(24))},
    {"temperature": 0.8, "logit_bias": {7: 4.0, 9: 4.0}, "bad_words": ((7, 9), (9,))},
    {"temperature": 1.0, "max_tokens": 2},
    {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 1},
    {"temperature": 0, "prompt_logprobs": 2, "logprobs": 2},
]


def params_of(way: int) -> SamplingParams:
    return SamplingParams(**{"max_tokens": NEW_TOKENS, "ignore_eos": True, "seed": way, **WAYS[way]})


def prompts_of(count: int) -> list[list[int]]:
    """Of 1 to 48 tokens; every third begins like the one before."""
    rng = random.Random(2)
    prompts: list[list[int]] = []
    for i in range(count):
        new = [rng.randrange(3, 250) for _ in range(rng.choice((1, 2, 9, 17, 33, 48)))]
        prompts.append(new if i % 3 else [*(prompts[-1][:32] if prompts else []), *new])
    return prompts


class Oracle:
    """Guesses the answers of a run without drafts, and spoils one token now and then."""

    def __init__(self, answers: Sequence[RequestResult], most: int) -> None:
        self._answers = {
            (tuple(answer.prompt_token_ids), completion.index, i % len(WAYS)): list(completion.token_ids)
            for i, answer in enumerate(answers)
            for completion in answer.completions
        }
        self._most = most
        self._rng = random.Random(3)
        self.num_drafts = 0

    def draft(self, decoding: list[Seq], num_tokens: int, room: int) -> Mapping[Seq, tuple[int, ...]]:
        found: dict[Seq, tuple[int, ...]] = {}
        for seq in decoding:
            answer = self._answers[seq.request.prompt_token_ids, seq.index, seq.params.seed or 0]
            guess = answer[seq.num_generated : seq.num_generated + self._rng.randint(0, self._most)]
            guess += [self._rng.randrange(250)] * self._rng.randint(0, 2)
            if guess and self._rng.random() < 0.5:
                place = self._rng.randrange(len(guess))
                guess[place] = (guess[place] + 1) % 250
            found[seq] = tuple(guess[: max(0, room)])
            room -= len(found[seq])
            self.num_drafts += len(found[seq])
        return found


def told(results: Sequence[RequestResult]) -> list[Any]:
    """All that a client sees."""
    return [
        (
            result.prompt_logprobs,
            [
                (c.token_ids, c.text, c.logprobs, c.text_starts, c.finish_reason, c.stop_reason)
                for c in result.completions
            ],
        )
        for result in results
    ]


def start(folder: Path, **settings: Any) -> LLM:
    return load(folder, **{"max_model_len": 160, "max_num_seqs": 16, "num_kv_pages": 400, **settings})


def run(llm: LLM, count: int) -> list[RequestResult]:
    results = llm.generate(prompts_of(count), [params_of(i % len(WAYS)) for i in range(count)])
    llm.engine.check_integrity()
    return results


def check(
    folder: Path, count: int = len(WAYS), both: Mapping[str, Any] = MappingProxyType({}), **settings: Any
) -> StepLog:
    """Answers with drafts are those without. `both`: settings of both."""
    expected = run(start(folder, **both), count)
    llm = start(folder, **both, **settings)
    oracle = Oracle(expected, most=4)
    llm.engine.scheduler.drafter = oracle
    log = StepLog(llm)
    assert told(run(llm, count)) == told(expected)
    accepted = sum(step.num_accepted_tokens for step in log.steps)
    assert 0 < accepted < sum(step.num_drafted_tokens for step in log.steps) <= oracle.num_drafts
    return log


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", MODELS)
def test_same_answers(case: str, dtype: str, checkpoint: Checkpoint) -> None:
    check(checkpoint(case), both={"dtype": dtype})


@pytest.mark.parametrize("case", MODELS)
def test_one_at_a_time(case: str, checkpoint: Checkpoint) -> None:
    """Steps of a few tokens: one call of the kernel for all layers."""
    check(checkpoint(case), both={"max_num_seqs": 1, "enable_prefix_caching": False})


@pytest.mark.parametrize("case", MODELS)
def test_module_by_module(case: str, checkpoint: Checkpoint) -> None:
    """Texts are the same. Log-probabilities may round: torch sums a dense layer by the number of its rows."""
    folder = checkpoint(case)
    expected = run(start(folder, enforce_eager=True), len(WAYS))
    llm = start(folder, enforce_eager=True)
    llm.engine.scheduler.drafter = Oracle(expected, 4)
    pairs = zip(run(llm, len(WAYS)), expected, strict=True)
    assert all(
        (ours.token_ids, ours.text, ours.finish_reason) == (own.token_ids, own.text, own.finish_reason)
        and [p.logprob for p in ours.logprobs] == pytest.approx([p.logprob for p in own.logprobs], abs=1e-4)
        for answer, other in pairs
        for ours, own in zip(answer.completions, other.completions, strict=True)
    )


@pytest.mark.parametrize("chunk", [5, 33])
def test_beside_chunks_of_prompts(chunk: int, checkpoint: Checkpoint) -> None:
    check(checkpoint("mixtral"), max_num_batched_tokens=chunk)


@pytest.mark.parametrize("case", ["mixtral", "deepseek_v2"])
def test_when_preempted(case: str, checkpoint: Checkpoint) -> None:
    log = check(checkpoint(case), count=2 * len(WAYS), num_kv_pages=14, enable_prefix_caching=False)
    assert log.num_preemptions > 0


@pytest.mark.parametrize("case", ["qwen3_moe", "deepseek_v2"])
def test_with_a_cache_of_experts(case: str, checkpoint: Checkpoint) -> None:
    folder = checkpoint(case)
    expected = run(start(folder), len(WAYS))
    llm = start(folder, moe_cache_mib=4)
    cache = host_managed(llm).cache
    cache.resize(cache.store.num_total // 2)
    llm.engine.scheduler.drafter = Oracle(expected, 4)
    assert told(run(llm, len(WAYS))) == told(expected)


def test_after_a_prefix_hit(checkpoint: Checkpoint) -> None:
    """Pages filled with drafts among them are found by others, and hold what they should."""
    folder = checkpoint("mixtral")
    expected = run(start(folder), len(WAYS))
    llm = start(folder)
    llm.engine.scheduler.drafter = Oracle(expected, 6)
    assert told(run(llm, len(WAYS))) == told(expected)
    llm.engine.scheduler.drafter = None
    longer = [[*r.prompt_token_ids, *r.completions[0].token_ids] for r in expected]
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=2)
    again = llm.generate(longer, greedy)
    assert sum(result.num_cached_tokens for result in again) > 100
    fresh = start(folder, enable_prefix_caching=False).generate(longer, greedy)
    assert told(again) == told(fresh)


def test_stop_strings(checkpoint: Checkpoint) -> None:
    """A stop string among tokens that came together cuts those behind it off."""
    folder = checkpoint("mixtral")
    prompts = prompts_of(len(WAYS))
    free = start(folder).generate(prompts, [params_of(i) for i in range(len(WAYS))])
    params = []
    for i, result in enumerate(free):
        text = result.completions[0].text
        stop = text[len(text) // 2 :][:2] or "none"
        params.append(SamplingParams(**{"max_tokens": 24, "ignore_eos": True, "seed": i, **WAYS[i], "stop": stop}))
    expected = start(folder).generate(prompts, params)
    llm = start(folder)
    llm.engine.scheduler.drafter = Oracle(free, 6)
    answers = llm.generate(prompts, params)
    assert told(answers) == told(expected)
    assert sum(c.stop_reason is not None for r in answers for c in r.completions) > 4
    llm.engine.check_integrity()


def test_by_prompt_lookup() -> None:
    """The demo model, whose greedy answers repeat themselves; a request with a grammar among them."""
    text = "def total(values):\n    result = 0\n    for value in values:\n        result += value\n    return result\n"
    grammar = GrammarSpec(GrammarKind.REGEX, "[ab]{8}")
    ways = [{"temperature": 0}, {"temperature": 0.5, "logprobs": 2}, {"temperature": 1.0}]
    params = [SamplingParams(max_tokens=48, seed=1, ignore_eos=True, **way) for way in ways]  # type: ignore[arg-type]
    params.append(SamplingParams(max_tokens=48, seed=1, grammar=grammar))
    expected = start(DEMO, max_model_len=512).generate([text + text] * 4, params)
    for trial in (False, True):
        llm = start(DEMO, max_model_len=512, speculative_method="ngram", speculative_trial=trial)
        log = StepLog(llm)
        assert told(llm.generate([text + text] * 4, params)) == told(expected)
        llm.engine.check_integrity()
        assert trial or sum(step.num_accepted_tokens for step in log.steps) > 0


def test_recurrent_layers_are_left_alone(checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    """Their states cannot be rolled back."""
    folder = checkpoint("qwen3_next")
    llm = start(folder, speculative_method="ngram", speculative_trial=False)
    assert llm.engine.scheduler.drafter is None
    assert "--speculative-method is off" in caplog.text
