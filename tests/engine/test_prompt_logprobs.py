"""Log-probabilities of prompts on the demo model, beside transformers' own, chunked, cached and preempted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_serve.cli.flags import default_model
from moe_serve.llm import LLM
from moe_serve.scheduling.sequence import SamplingParams

TEXTS = (
    "Once upon a time there was a little dog who lived in a big house with a garden.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))\n" * 3,
    "7",
)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """Chunks of 24 tokens, pages of 8."""
    llm = LLM(default_model(), max_num_batched_tokens=24, block_size=8, num_kv_pages=96, max_model_len=256)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def expected(llm: LLM) -> list[torch.Tensor]:
    """[T - 1, V] log-probabilities of each text, after each token but the last."""
    model = AutoModelForCausalLM.from_pretrained(default_model(), dtype=torch.float32)
    with torch.inference_mode():
        ids = [torch.tensor([llm.tokenizer.encode(text)]) for text in TEXTS]
        return [model(input_ids=i).logits[0, :-1].log_softmax(-1) for i in ids]


def test_they_are_transformers_log_softmax(llm: LLM, expected: list[torch.Tensor]) -> None:
    results = llm.generate(TEXTS, SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=3))
    for result, reference in zip(results, expected, strict=True):
        ids = torch.tensor(result.prompt_token_ids[1:], dtype=torch.int64)
        assert [entry.token_id for entry in result.prompt_logprobs] == ids.tolist()
        if len(ids) == 0:
            continue
        own = reference.gather(1, ids[:, None])
        found = torch.tensor([entry.logprob for entry in result.prompt_logprobs])
        torch.testing.assert_close(found, own[:, 0], atol=2e-4, rtol=1e-4)
        top = torch.tensor([[value for _, value in entry.top] for entry in result.prompt_logprobs])
        torch.testing.assert_close(top, reference.topk(3).values, atol=2e-4, rtol=1e-4)
        ranks = torch.tensor([entry.rank for entry in result.prompt_logprobs])
        apart = (reference - own).abs().scatter(1, ids[:, None], 1.0).amin(1) > 1e-3  # no near ties
        assert torch.equal(ranks[apart], ((reference > own).sum(1) + 1)[apart])


def test_a_cached_prefix_changes_nothing(llm: LLM) -> None:
    plain = SamplingParams(temperature=0, max_tokens=4)
    scored = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=0)
    llm.generate([TEXTS[0]], plain)
    first, second = llm.generate([TEXTS[0]], scored)[0], llm.generate([TEXTS[0]], scored)[0]
    again = llm.generate([TEXTS[0]], plain)[0]
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 0)
    assert again.num_cached_tokens > 0
    assert first.prompt_logprobs == second.prompt_logprobs
    assert len({tuple(r.completions[0].token_ids) for r in (first, second, again)}) == 1


def test_samples_share_the_scored_prompt(llm: LLM) -> None:
    result = llm.generate([TEXTS[1]], SamplingParams(n=3, seed=1, max_tokens=3, prompt_logprobs=0))[0]
    assert len(result.prompt_logprobs) == len(result.prompt_token_ids) - 1
    assert [len(c.token_ids) for c in result.completions] == [3] * 3


def test_a_prompt_alone(llm: LLM) -> None:
    """max_tokens 0 computes and scores a prompt that fills the context."""
    ids = (llm.tokenizer.encode(TEXTS[1]) * 4)[:256]
    result = llm.generate([ids], SamplingParams(max_tokens=0, prompt_logprobs=1))[0]
    assert len(result.prompt_logprobs) == 255
    assert result.completions[0].token_ids == []
    assert result.completions[0].finish_reason == "length"
