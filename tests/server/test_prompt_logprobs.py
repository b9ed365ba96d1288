"""prompt_logprobs, and echo with logprobs as lm-eval-harness asks for it."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from moe_serve.engine.async_engine import AsyncEngine
from moe_serve.server.app import create_app
from moe_serve.text.tokenizer import Tokenizer
from tests.random_model import RandomRunner, random_engine

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [20, 21, 22], [30]]


def ask(tokenizer: Tokenizer, path: str, *bodies: dict[str, Any]) -> list[httpx.Response]:
    """To a new random model."""
    app = create_app(AsyncEngine(random_engine(tokenizer)), tokenizer, model_name="tiny")

    async def run() -> list[httpx.Response]:
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
        async with app.router.lifespan_context(app), client:
            return [await client.post(path, json=body) for body in bodies]

    return asyncio.run(run())


def complete(tokenizer: Tokenizer, **body: Any) -> list[dict[str, Any]]:
    response = ask(tokenizer, COMPLETIONS, {"prompt": PROMPTS, "seed": 1} | body)[0]
    assert response.status_code == 200, response.text
    choices: list[dict[str, Any]] = sorted(response.json()["choices"], key=lambda choice: choice["index"])
    return choices


def reference(tokenizer: Tokenizer, ids: list[int]) -> list[float]:
    """Log-probabilities of ids[1:]."""
    runner = random_engine(tokenizer).runner
    assert isinstance(runner, RandomRunner)
    return [float(runner.noise(ids[:i]).log_softmax(-1)[ids[i]]) for i in range(1, len(ids))]


def test_log_likelihoods_as_lm_eval_reads_them(tokenizer: Tokenizer) -> None:
    """It sends token ids with max_tokens 1, leaves out the last token, and asks whether greedy would say the same."""
    choices = complete(tokenizer, echo=True, logprobs=1, max_tokens=1, temperature=0)
    for choice, prompt in zip(choices, PROMPTS, strict=True):
        found = choice["logprobs"]
        assert len({len(found[k]) for k in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}) == 1
        assert found["token_logprobs"][0] is None
        assert found["top_logprobs"][0] is None
        assert found["token_logprobs"][1:-1] == pytest.approx(reference(tokenizer, prompt), abs=1e-5)
        for own, top in zip(found["token_logprobs"][1:-1], found["top_logprobs"][1:-1], strict=True):
            assert own <= max(top.values())
        assert found["token_logprobs"][-1] == max(found["top_logprobs"][-1].values()), "greedy"


@pytest.mark.parametrize("extra", [{}, {"n": 2}, {"stream": True}])
def test_max_tokens_zero_is_the_prompt_alone(tokenizer: Tokenizer, sse: Any, extra: dict[str, Any]) -> None:
    body = {"prompt": PROMPTS, "echo": True, "logprobs": 0, "max_tokens": 0, **extra}
    response = ask(tokenizer, COMPLETIONS, body)[0]
    if "stream" in extra:
        choices = sorted((c for chunk in sse(response.text) for c in chunk["choices"]), key=lambda c: c["index"])
    else:
        choices = response.json()["choices"]
        assert response.json()["usage"]["completion_tokens"] == 0
    n = extra.get("n", 1)
    assert len(choices) == len(PROMPTS) * n
    for choice in choices:
        prompt = PROMPTS[choice["index"] // n]
        assert choice["text"] == tokenizer.decode(prompt)
        assert choice["finish_reason"] == "length"
        assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(reference(tokenizer, prompt), abs=1e-5)


def test_echo_without_logprobs_and_without_tokens(tokenizer: Tokenizer) -> None:
    assert [c["text"] for c in complete(tokenizer, echo=True, max_tokens=0)] == [tokenizer.decode(p) for p in PROMPTS]
    assert [c["text"] for c in complete(tokenizer, max_tokens=0)] == ["", "", ""]


def test_streamed_and_whole_echoes_say_the_same(tokenizer: Tokenizer, sse: Any) -> None:
    body = {"prompt": PROMPTS[0], "seed": 3, "echo": True, "logprobs": 2, "max_tokens": 6, "ignore_eos": True}
    whole, streamed = ask(tokenizer, COMPLETIONS, body, {**body, "stream": True})
    expected = whole.json()["choices"][0]
    chunks = [chunk["choices"][0] for chunk in sse(streamed.text)]
    assert "".join(c["text"] for c in chunks) == expected["text"]
    for name in ("tokens", "text_offset"):
        assert [v for c in chunks for v in c["logprobs"][name]] == expected["logprobs"][name]
    values = [v for c in chunks for v in c["logprobs"]["token_logprobs"]]
    assert values[1:] == pytest.approx(expected["logprobs"]["token_logprobs"][1:])


def test_prompt_logprobs_of_completions(tokenizer: Tokenizer) -> None:
    choice = complete(tokenizer, prompt=PROMPTS[0], prompt_logprobs=2, max_tokens=1)[0]
    assert choice["logprobs"] is None
    first, *entries = choice["prompt_logprobs"]
    assert first is None
    for entry, token, logprob in zip(entries, PROMPTS[0][1:], reference(tokenizer, PROMPTS[0]), strict=True):
        own = entry[str(token)]
        assert own["logprob"] == pytest.approx(logprob, abs=1e-5)
        assert own["decoded_token"] == tokenizer.token_text(token)
        assert {1, 2} <= {value["rank"] for value in entry.values()}
        assert len(entry) == (2 if own["rank"] <= 2 else 3)
        ordered = sorted(entry.values(), key=lambda value: value["rank"])
        assert [v["logprob"] for v in ordered] == sorted((v["logprob"] for v in ordered), reverse=True)


def test_prompt_logprobs_of_chats(tokenizer: Tokenizer) -> None:
    body = {"messages": [{"role": "user", "content": "The fox"}], "max_tokens": 2, "n": 2, "prompt_logprobs": 0}
    answer = ask(tokenizer, CHAT, {**body, "return_token_ids": True})[0].json()
    ids = answer["prompt_token_ids"]
    values = [entry[str(i)]["logprob"] for entry, i in zip(answer["prompt_logprobs"][1:], ids[1:], strict=True)]
    assert values == pytest.approx(reference(tokenizer, ids), abs=1e-5)
