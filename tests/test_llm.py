"""LLM as Python callers use it, vLLM's habits included: what a prompt may be, and what is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from moe_serve import LLM, Completion, InvalidRequestError, RequestResult, SamplingParams
from moe_serve.cli.flags import default_model
from moe_serve.errors import ConfigError

GREEDY = SamplingParams(temperature=0, max_tokens=6)
TEXT = "It was a dark and"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(default_model(), max_model_len=256, num_kv_pages=64, num_threads=1) as model:
        yield model


def _text(results: list[RequestResult]) -> str:
    (result,) = results
    return result.completions[0].text


def test_one_prompt_may_be_a_text_a_dict_or_ids(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode(TEXT)
    expected = _text(llm.generate([TEXT], GREEDY))
    assert expected
    both: list[str | list[int]] = [TEXT, ids]
    prompts: list[str | list[int] | dict[str, Any]] = [TEXT, ids, {"prompt": TEXT}, {"prompt_token_ids": ids}]
    for prompt in prompts:
        assert _text(llm.generate(prompt, GREEDY)) == expected
        assert "".join(output.text for output in llm.stream(prompt, GREEDY)) == expected
    assert [_text([result]) for result in llm.generate(both, GREEDY)] == [expected, expected]


def test_one_string_is_one_stop_string(llm: LLM) -> None:
    word = _text(llm.generate(TEXT, GREEDY)).split()[-1]
    given, listed = (SamplingParams(temperature=0, max_tokens=6, stop=stop) for stop in (word, (word,)))
    assert given == listed
    assert given.stop == (word,)
    (result,) = llm.generate(TEXT, given)
    assert result.outputs[0].stop_reason == word


def test_outputs_is_vllms_name(llm: LLM) -> None:
    (result,) = llm.generate(TEXT, GREEDY)
    assert result.outputs is result.completions
    assert isinstance(result.outputs[0], Completion)


def test_chat_takes_one_conversation_or_several(llm: LLM) -> None:
    talk = [{"role": "user", "content": "Hello!"}]
    one, several = _text(llm.chat(talk, GREEDY)), llm.chat([talk, talk], GREEDY)
    assert one
    assert [r.outputs[0].text for r in several] == [one] * 2


def test_chat_takes_parameters_for_each_conversation(llm: LLM) -> None:
    talk = [{"role": "user", "content": "Hello!"}]
    short = SamplingParams(temperature=0, max_tokens=2)
    counts = [len(r.outputs[0].token_ids) for r in llm.chat([talk, talk], [short, GREEDY])]
    assert counts == [2, 6]


def test_sampling_params_is_vllms_name(llm: LLM) -> None:
    talk = [{"role": "user", "content": "Hello!"}]
    assert _text(llm.generate(TEXT, sampling_params=GREEDY)) == _text(llm.generate(TEXT, GREEDY))
    assert _text(llm.chat(talk, sampling_params=GREEDY)) == _text(llm.chat(talk, GREEDY))
    for call in (llm.generate, llm.chat):
        with pytest.raises(InvalidRequestError, match="two names of one argument"):
            call(talk, GREEDY, sampling_params=GREEDY)


@pytest.mark.parametrize("prompts", [b"text", 3, None, {"text": "x"}, [b"text"], [["a"]], [{"prompt_token_ids": "12"}]])
def test_what_is_no_prompt_is_refused_by_name(llm: LLM, prompts: Any) -> None:
    with pytest.raises(InvalidRequestError, match="prompt"):
        llm.generate(prompts, GREEDY)


@pytest.mark.parametrize("messages", ["Hello!", [["Hello!"]][0], 3])
def test_what_is_no_conversation_is_refused_by_name(llm: LLM, messages: Any) -> None:
    with pytest.raises(InvalidRequestError, match="messages takes"):
        llm.chat(messages)


@pytest.mark.parametrize("params", [{"temperature": 0}, "greedy", [3]])
def test_wrong_params_are_refused_by_name(llm: LLM, params: Any) -> None:
    with pytest.raises(InvalidRequestError, match="params takes"):
        llm.generate(TEXT, params)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop", 3),
        ("stop", [3]),
        ("stop", b"x"),
        ("stop_token_ids", "12"),
        ("stop_token_ids", ["1"]),
        ("allowed_token_ids", "12"),
        ("allowed_token_ids", 5),
        ("bad_words", "word"),
        ("bad_words", ["word"]),
        ("max_tokens", "5"),
        ("max_tokens", True),
        ("n", None),
        ("n", 1.5),
        ("temperature", "0"),
        ("temperature", None),
        ("top_k", 1.5),
    ],
)
def test_a_wrong_type_names_the_field(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{name} takes") as error:
        SamplingParams(**{name: value})
    assert error.value.param == name


def test_lists_are_kept_as_tuples() -> None:
    params: dict[str, Any] = {"stop_token_ids": [1], "allowed_token_ids": [2, 3], "bad_words": [[4, 5]]}
    kept = SamplingParams(**params)
    assert (kept.stop_token_ids, kept.allowed_token_ids, kept.bad_words) == ((1,), (2, 3), ((4, 5),))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"max_num_sqs": 4}, "LLM has no setting 'max_num_sqs'; did you mean max_num_seqs"),
        ({"expert_plam": "x"}, "did you mean expert_plan"),
        ({"moe_cache_mib": 0, "moe_prefetch": "affinity"}, "--moe-prefetch has no effect"),
    ],
)
def test_a_wrong_setting_is_refused_before_the_model_loads(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        LLM("no/model", **settings)


@pytest.mark.parametrize("settings", [{"num_kv_pages": 2_000_000_000}, {"kv_cache_mib": 2_000_000_000}])
def test_more_memory_than_there_is_names_the_setting(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"KV pages take \d+ MiB, and \d+ MiB are free; lower --kv-cache-mib"):
        LLM(default_model(), max_model_len=64, num_threads=1, device="cpu", **settings)


def test_a_cache_that_is_not_needed_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with LLM(default_model(), max_model_len=64, num_kv_pages=8, num_threads=1, moe_prefetch="affinity", device="cpu"):
        assert "no expert cache: --moe-prefetch has no effect" in caplog.text
