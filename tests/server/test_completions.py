"""/v1/completions: the JSON of whole and streamed answers."""

from __future__ import annotations

from typing import Any

import pytest

PATH = "/v1/completions"


def test_whole_answer_has_openais_shape(served: Any, sentence: str) -> None:
    answer = served.post(PATH, prompt="The quick", max_tokens=5, model="fake-model")
    assert answer["object"] == "text_completion"
    assert answer["model"] == "fake-model"
    assert answer["id"].startswith("cmpl-")
    assert isinstance(answer["created"], int)
    (choice,) = answer["choices"]
    assert choice["index"] == 0
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    assert choice["text"]
    assert sentence.startswith(choice["text"])


def test_usage_counts_prompt_completion_and_cached_tokens(served: Any) -> None:
    usage = served.post(PATH, prompt=[5, 6, 7, 8], max_tokens=5)["usage"]
    assert usage == {
        "prompt_tokens": 4,
        "completion_tokens": 5,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_max_tokens_is_16_where_not_given(served: Any) -> None:
    assert served.post(PATH, prompt="x")["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("extra", [{}, {"stop": "fox"}, {"n": 3}, {"prompt": ["a", "b"], "n": 2}, {"echo": True}])
def test_streamed_text_equals_whole_text(make: Any, extra: dict[str, Any]) -> None:
    body = {"prompt": "x", "max_tokens": 40, **extra}
    whole = make().post(PATH, **body)["choices"]
    chunks = make().stream(PATH, **body)
    texts, ends = [""] * len(whole), [None] * len(whole)
    for choice in (c["choices"][0] for c in chunks):
        assert ends[choice["index"]] is None, "nothing follows a finish_reason"
        texts[choice["index"]] += choice["text"]
        ends[choice["index"]] = choice["finish_reason"]
    assert texts == [c["text"] for c in whole]
    assert ends == [c["finish_reason"] for c in whole]


def test_usage_chunk_comes_last_and_only_when_asked(make: Any) -> None:
    plain = make().stream(PATH, prompt="x", max_tokens=3)
    assert all("usage" not in c for c in plain)
    asked = make().stream(PATH, prompt="x", max_tokens=3, stream_options={"include_usage": True})
    assert asked[-1]["choices"] == []
    assert asked[-1]["usage"]["completion_tokens"] == 3
    assert len({c["id"] for c in asked}) == 1


def test_continuous_usage_counts_up(served: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = served.stream(PATH, prompt="x", max_tokens=4, stream_options=options)
    assert [c["usage"]["completion_tokens"] for c in chunks] == [1, 2, 3, 4, 4]


def test_choices_are_numbered_through_prompts_and_samples(served: Any, tokenizer: Any) -> None:
    answer = served.post(PATH, prompt=["a", "bc"], n=2, max_tokens=4, return_token_ids=True)
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
    ids = [c["token_ids"] for c in answer["choices"]]
    assert ids[0] == ids[2] != ids[1] == ids[3]
    assert answer["usage"]["completion_tokens"] == 16
    prompts = len(tokenizer.encode("a")) + len(tokenizer.encode("bc"))
    assert answer["usage"]["prompt_tokens"] == prompts, "each prompt counts once, not once per sample"


def test_list_of_token_lists_is_several_prompts(served: Any) -> None:
    assert len(served.post(PATH, prompt=[[5, 6], [7]], max_tokens=1)["choices"]) == 2


def test_echo_puts_the_prompt_first(served: Any) -> None:
    answer = served.post(PATH, prompt=["lazy ", "dog "], echo=True, n=2, max_tokens=2)
    starts = [c["text"][:4] for c in answer["choices"]]
    assert starts == ["lazy", "lazy", "dog ", "dog "]


def test_logprobs_are_parallel_lists(served: Any, tokenizer: Any) -> None:
    choice = served.post(PATH, prompt="x", max_tokens=6, logprobs=3, return_token_ids=True)["choices"][0]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == [tokenizer.token_text(i) for i in choice["token_ids"]]
    assert logprobs["token_logprobs"] == [-0.25] * 6
    assert all(len(top) == 3 for top in logprobs["top_logprobs"])
    assert min(logprobs["top_logprobs"][0].values()) == -9999.0, "minus infinity is no JSON number"
    assert logprobs["text_offset"][:2] == [0, len(logprobs["tokens"][0])]


def test_streamed_logprobs_continue_the_offsets(make: Any) -> None:
    body = {"prompt": "x", "max_tokens": 6, "logprobs": 3}
    whole = make().post(PATH, **body)["choices"][0]["logprobs"]
    chunks = [c["choices"][0]["logprobs"] for c in make().stream(PATH, **body)]
    for name in ("tokens", "text_offset", "token_logprobs"):
        assert [x for c in chunks for x in c[name]] == whole[name]


def test_logprobs_zero_names_only_the_sampled_token(served: Any) -> None:
    logprobs = served.post(PATH, prompt="x", max_tokens=2, logprobs=0)["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] is None
    assert len(logprobs["token_logprobs"]) == 2


@pytest.mark.parametrize("include", [False, True])
def test_stop_string_ends_the_text(served: Any, include: bool) -> None:
    answer = served.post(PATH, prompt="x", max_tokens=60, stop=["fox"], include_stop_str_in_output=include)
    (choice,) = answer["choices"]
    assert choice["text"] == "The quick brown " + ("fox" if include else "")
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "fox")


def test_token_ids_come_back_when_asked(make: Any) -> None:
    whole = make().post(PATH, prompt="x", max_tokens=60, return_token_ids=True)["choices"][0]["token_ids"]
    chunks = make().stream(PATH, prompt="x", max_tokens=60, return_token_ids=True)
    assert [i for c in chunks for i in c["choices"][0]["token_ids"]] == whole
    assert len(whole) == 60


def test_request_id_is_the_body_field_or_the_header(make: Any) -> None:
    response = make().talk((PATH, {"prompt": "x", "request_id": "abc"}))[0]
    assert response.headers["x-request-id"] == response.json()["id"] == "cmpl-abc"


def test_sampling_defaults_of_the_checkpoint_give_way_to_the_body(make: Any) -> None:
    served = make(app_sampling_defaults={"max_tokens": 3, "temperature": 0.0})
    assert served.post(PATH, prompt="x", max_tokens=5)["usage"]["completion_tokens"] == 5
