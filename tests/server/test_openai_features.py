"""Each documented field through the real openai client, against the real server, engine and sampler."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from moe_serve.text.tokenizer import Tokenizer
from tests.server.scripted_model import ASK, PLAIN_TEMPLATE, Model, refused_param, start


@pytest.fixture
def model(tokenizer_folder: Path, tmp_path: Path) -> Iterator[Model]:
    yield from start(tokenizer_folder, tmp_path, PLAIN_TEMPLATE)


def complete(model: Model, **body: Any) -> Any:
    fields: dict[str, Any] = {"model": "tiny", "prompt": "fox", "max_tokens": 8, "seed": 1} | body
    return model.client.completions.create(**fields)


def text(model: Model, **body: Any) -> str:
    return str(complete(model, **body).choices[0].text)


def test_seed_repeats_and_n_differs(model: Model) -> None:
    assert text(model) == text(model)
    assert text(model) != text(model, seed=2)
    several = complete(model, n=3)
    assert [c.index for c in several.choices] == [0, 1, 2]
    assert len({c.text for c in several.choices}) == 3
    assert several.choices[0].text == text(model)
    assert several.usage.completion_tokens == sum(8 for _ in several.choices)


def test_temperature_0_is_greedy_and_so_is_every_narrow_sampling(model: Model) -> None:
    greedy = text(model, temperature=0)
    assert greedy == text(model, temperature=0, seed=9)
    assert greedy == text(model, top_p=1e-9)
    assert greedy == text(model, extra_body={"top_k": 1})
    assert greedy == text(model, extra_body={"min_p": 1.0})


def test_penalties_and_bias_change_the_choice(model: Model, tokenizer: Tokenizer) -> None:
    (x,) = tokenizer.encode("x")
    assert text(model, logit_bias={str(x): 100}) == "x" * 8
    penalised = text(model, logit_bias={str(x): 5}, temperature=0, frequency_penalty=2, presence_penalty=2)
    assert penalised.count("x") < text(model, logit_bias={str(x): 5}, temperature=0).count("x")
    harsh = {"repetition_penalty": 50.0, "return_token_ids": True}
    ids = complete(model, max_tokens=40, temperature=0, extra_body=harsh).choices[0].token_ids
    assert len(set(ids)) == len(ids)


def test_stop_strings_and_stop_tokens(model: Model, tokenizer: Tokenizer) -> None:
    model.says("lazy dog.")
    assert text(model, stop="dog") == "lazy "
    assert text(model, stop=["dog", "y d"]) == "laz"
    assert text(model, stop="dog", extra_body={"include_stop_str_in_output": True}) == "lazy dog"
    (stop,) = tokenizer.encode(".")
    stopped = complete(model, max_tokens=20, extra_body={"stop_token_ids": [stop]}).choices[0]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)


def test_the_end_token_ends_unless_ignored_or_too_early(model: Model) -> None:
    model.says("dog.")
    ended = complete(model, max_tokens=30).choices[0]
    assert (ended.text, ended.finish_reason) == ("dog.", "stop")
    ignored = complete(model, max_tokens=30, extra_body={"ignore_eos": True}).choices[0]
    assert ignored.finish_reason == "length"
    later = complete(model, max_tokens=30, extra_body={"min_tokens": 25})
    assert later.usage.completion_tokens >= 25
    shown = text(model, max_tokens=30, extra_body={"skip_special_tokens": False})
    assert shown == "dog.<eos>"


def test_echo_and_logprobs(model: Model) -> None:
    assert text(model, echo=True) == "fox" + text(model)
    found = complete(model, logprobs=2).choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == 8
    assert all(1 <= len(top) <= 2 for top in found.top_logprobs), "keyed by text: halves of characters look alike"
    chat = model.chat(logprobs=True, top_logprobs=3, max_tokens=4).logprobs.content
    assert [len(entry.top_logprobs) for entry in chat] == [3] * 4
    assert all(entry.logprob <= entry.top_logprobs[0].logprob for entry in chat)
    both = complete(model, echo=True, logprobs=1).choices[0]
    assert both.text == text(model, echo=True)
    assert "".join(both.logprobs.tokens).startswith("fox")
    assert both.logprobs.token_logprobs[0] is None
    assert all(p <= 0 for p in both.logprobs.token_logprobs[1:])


def test_tokens_as_ids(model: Model) -> None:
    body: Any = {"logprobs": 2, "extra_body": {"return_tokens_as_token_ids": True, "return_token_ids": True}}
    choice = complete(model, **body).choices[0]
    assert choice.logprobs.tokens == [f"token_id:{i}" for i in choice.token_ids]
    assert all(len(top) == 2 for top in choice.logprobs.top_logprobs), "no two ids are equal"
    chat = model.chat(logprobs=True, max_tokens=2, extra_body={"return_tokens_as_token_ids": True}).logprobs.content
    assert all(entry.token.startswith("token_id:") for entry in chat)


def test_prefixes_are_shared_within_a_salt(model: Model) -> None:
    def cached(salt: str | None) -> int:
        body = {"cache_salt": salt} if salt else {}
        usage = complete(model, prompt=list(range(5, 45)), extra_body=body).usage
        return int(usage.prompt_tokens_details.cached_tokens)

    assert [cached(salt) for salt in (None, "a", "b", None, "a", "b")] == [0, 0, 0, 32, 32, 32]


def test_usage_counts_cached_tokens_whole_and_streamed(model: Model) -> None:
    prompt = list(range(5, 45))
    first, second = complete(model, prompt=prompt).usage, complete(model, prompt=prompt).usage
    assert first.prompt_tokens == second.prompt_tokens == 40
    assert first.prompt_tokens_details.cached_tokens == 0
    assert second.prompt_tokens_details.cached_tokens == 32, "whole pages of 8, and at least one token is computed"
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(complete(model, prompt=prompt, stream=True, stream_options=options))
    assert chunks[-1].usage == second
    assert not chunks[-1].choices
    counts = [c.usage.completion_tokens for c in chunks[:-1]]
    assert counts == sorted(counts)


def test_request_ids_come_back(model: Model) -> None:
    raw = model.client.completions.with_raw_response
    own = raw.create(model="tiny", prompt="x", max_tokens=1, extra_body={"request_id": "mine"})
    assert own.headers["x-request-id"] == own.parse().id == "cmpl-mine"
    headed = raw.create(model="tiny", prompt="x", max_tokens=1, extra_headers={"X-Request-Id": "theirs"})
    assert headed.parse().id == "cmpl-theirs"
    assert headed.parse()._request_id == "cmpl-theirs"


def test_token_ids_are_returned_whole_and_streamed(model: Model, tokenizer: Tokenizer) -> None:
    body: dict[str, Any] = {"extra_body": {"return_token_ids": True}}
    whole = complete(model, **body).choices[0]
    assert whole.prompt_token_ids == tokenizer.encode("fox")
    assert tokenizer.decode(whole.token_ids) == whole.text
    chunks = [c.choices[0] for c in complete(model, stream=True, **body)]
    assert [i for c in chunks for i in c.token_ids] == whole.token_ids
    assert chunks[0].prompt_token_ids == whole.prompt_token_ids
    chat = list(model.client.chat.completions.create(model="tiny", messages=ASK, stream=True, max_tokens=3, **body))
    assert chat[0].prompt_token_ids == tokenizer.encode("The weather?\n")


def test_max_completion_tokens_goes_before_max_tokens(model: Model) -> None:
    answer = model.client.chat.completions.create(
        model="tiny", messages=ASK, max_completion_tokens=3, max_tokens=9, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


def test_tags_are_accepted_and_change_nothing(model: Model) -> None:
    plain = model.chat(max_tokens=5).message.content
    tags: dict[str, Any] = {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}
    tags |= {"safety_identifier": "s", "prompt_cache_key": "k", "extra_body": {"priority": -3, "best_of": 1}}
    assert model.chat(max_tokens=5, **tags).message.content == plain
    assert refused_param(lambda: model.chat(store=True)) == "store"


def test_a_message_can_be_continued(model: Model) -> None:
    messages: Any = [*ASK, {"role": "assistant", "content": "It"}]
    more = {"continue_final_message": True, "add_generation_prompt": False, "return_token_ids": True}
    answer = model.client.chat.completions.create(model="tiny", messages=messages, max_tokens=1, extra_body=more)
    shown = model.engine.tokenizer.decode(answer.prompt_token_ids)  # type: ignore[attr-defined]
    assert shown == "The weather?\nIt"


def test_several_prompts_in_one_body(model: Model) -> None:
    answer = complete(model, prompt=["fox", "dog"], n=2)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == text(model)


def test_models_and_errors(model: Model) -> None:
    assert [m.id for m in model.client.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError):
        model.client.models.retrieve("gpt-4")
    assert refused_param(lambda: complete(model, temperature=-1)) == "temperature"
    assert refused_param(lambda: complete(model, extra_body={"temprature": 1})) == "temprature"
