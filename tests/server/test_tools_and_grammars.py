"""Tools, reasoning and structured output through the real openai client, server, engine and sampler.

Only the model is missing: it says what the test scripts, or noise within the grammar.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pydantic
import pytest

from tests.server.scripted_model import ASK, Model, refused_param, start

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"city": {"enum": ["Oslo", "Rom"]}},
}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
CLOCK: Any = {"type": "function", "function": {"name": "clock", "description": "The time."}}
NAMED: Any = {"type": "function", "function": {"name": "weather"}}
VERDICT: Any = {
    "type": "json_schema",
    "json_schema": {
        "name": "verdict",
        "schema": {
            "type": "object",
            "properties": {"rain": {"type": "boolean"}},
            "required": ["rain"],
            "additionalProperties": False,
        },
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>'


# ---- auto ---------------------------------------------------------------------------------------------


def test_a_call_the_model_makes_is_parsed(hermes: Model) -> None:
    hermes.says(f"Let me see.\n{CALL}")
    for choice in (hermes.chat(tools=[WEATHER]), hermes.stream(tools=[WEATHER])[0]):
        (call,) = choice.message.tool_calls
        assert (call.type, call.function.name) == ("function", "weather")
        assert json.loads(call.function.arguments) == {"city": "Oslo", "days": 2}
        assert choice.message.content == "Let me see."
        assert choice.finish_reason == "tool_calls"


def test_two_calls_or_one_when_not_parallel(hermes: Model) -> None:
    hermes.says(CALL + "\n" + CALL.replace("Oslo", "Rom"))
    calls = hermes.chat(tools=[WEATHER]).message.tool_calls
    assert [json.loads(c.function.arguments)["city"] for c in calls] == ["Oslo", "Rom"]
    assert len({c.id for c in calls}) == 2
    assert len(hermes.chat(tools=[WEATHER], parallel_tool_calls=False).message.tool_calls) == 1
    _, chunks = hermes.stream(tools=[WEATHER])
    deltas = [d for c in chunks if c.choices for d in c.choices[0].delta.tool_calls or []]
    assert [d.index for d in deltas] == [0, 1]


def test_an_answer_without_a_call_is_content(hermes: Model) -> None:
    hermes.says("It rains.")
    choice = hermes.chat(tools=[WEATHER])
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == ("It rains.", None, "stop")


def test_a_call_that_is_no_json_is_shown_as_content(hermes: Model) -> None:
    text = "So: <tool_call>weather(Oslo)</tool_call>"
    hermes.says(text)
    for choice in (hermes.chat(tools=[WEATHER]), hermes.stream(tools=[WEATHER])[0]):
        assert re.sub(r"\s|<eos>", "", choice.message.content) == re.sub(r"\s", "", text)
        assert not choice.message.tool_calls
        assert choice.finish_reason == "stop"


def test_reasoning_is_told_apart(hermes: Model) -> None:
    hermes.says("<think>\nHm, rain.\n</think>It rains.")
    for choice in (hermes.chat(), hermes.stream()[0]):
        assert choice.message.content.strip() == "It rains."
        assert choice.message.reasoning_content.strip() == "Hm, rain."
    hidden = hermes.chat(extra_body={"include_reasoning": False}).message
    assert hidden.content.strip() == "It rains."
    assert not hasattr(hidden, "reasoning_content")


def test_tool_choice_none_shows_the_model_no_tools(hermes: Model) -> None:
    hermes.says(CALL)
    choice = hermes.chat(tools=[WEATHER], tool_choice="none", extra_body={"return_token_ids": True})
    assert choice.message.tool_calls is None
    assert "weather" in choice.message.content
    ids = hermes.client.chat.completions.create(
        model="tiny",
        messages=ASK,
        tools=[WEATHER],
        tool_choice="none",
        max_tokens=1,
        extra_body={"return_token_ids": True},
    ).prompt_token_ids  # type: ignore[attr-defined]
    assert "Tools" not in hermes.engine.tokenizer.decode(ids)


def test_the_conversation_goes_on_after_a_call(hermes: Model) -> None:
    hermes.says(f"{CALL}")
    message = hermes.chat(tools=[WEATHER]).message
    hermes.says("It rains in Oslo.")
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    answer = hermes.chat(messages=[*ASK, message, result], tools=[WEATHER])
    assert answer.message.content == "It rains in Oslo."


# ---- forced calls ---------------------------------------------------------------------------------------


def test_required_makes_noise_into_calls(hermes: Model) -> None:
    for seed in range(4):
        whole = hermes.chat(tools=[WEATHER, CLOCK], tool_choice="required", seed=seed, parallel_tool_calls=False)
        streamed, _ = hermes.stream(
            tools=[WEATHER, CLOCK], tool_choice="required", seed=seed, parallel_tool_calls=False
        )
        for choice in (whole, streamed):
            (call,) = choice.message.tool_calls
            schema = PARAMETERS if call.function.name == "weather" else {"type": "object", "maxProperties": 0}
            jsonschema.validate(json.loads(call.function.arguments), schema)
            assert choice.finish_reason == "tool_calls"
            assert not choice.message.content
        a, b = whole.message.tool_calls[0].function, streamed.message.tool_calls[0].function
        assert (a.name, a.arguments) == (b.name, b.arguments)


@pytest.mark.parametrize("word", ["password", "path", "regex", "json-string", "color"])
def test_an_unknown_format_refuses_no_tool(hermes: Model, word: str) -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "string", "format": word, "maxLength": 3}}}
    tool: Any = {
        "type": "function",
        "function": {"name": "f", "parameters": {**parameters, "required": ["a"], "additionalProperties": False}},
    }
    for choice in ("required", {"type": "function", "function": {"name": "f"}}):
        (call, *_) = hermes.chat(tools=[tool], tool_choice=choice).message.tool_calls
        assert isinstance(json.loads(call.function.arguments)["a"], str)


def test_required_may_make_several_calls(hermes: Model) -> None:
    hermes.says('[{"name": "clock", "parameters": {}}, {"name": "weather", "parameters": {"city": "Rom", "days": 3}}]')
    for choice in (
        hermes.chat(tools=[WEATHER, CLOCK], tool_choice="required"),
        hermes.stream(tools=[WEATHER, CLOCK], tool_choice="required")[0],
    ):
        calls = [(c.function.name, json.loads(c.function.arguments)) for c in choice.message.tool_calls]
        assert calls == [("clock", {}), ("weather", {"city": "Rom", "days": 3})]


def test_named_function_streams_arguments(hermes: Model) -> None:
    whole = hermes.chat(tools=[WEATHER, CLOCK], tool_choice=NAMED)
    streamed, chunks = hermes.stream(tools=[WEATHER, CLOCK], tool_choice=NAMED)
    (call,) = whole.message.tool_calls
    jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)
    assert streamed.message.tool_calls[0].function.arguments == call.function.arguments
    assert whole.finish_reason == streamed.finish_reason == "stop"
    deltas = [d for c in chunks if c.choices for d in c.choices[0].delta.tool_calls or []]
    assert len(deltas) > 2
    assert [d.function.name for d in deltas] == ["weather"] + [None] * (len(deltas) - 1)


def test_a_forced_call_cut_short_says_length(hermes: Model) -> None:
    for choice in (NAMED, "required"):
        cut = hermes.chat(tools=[WEATHER], tool_choice=choice, max_tokens=3)
        assert cut.finish_reason == "length"


def test_tools_work_with_n_logprobs_and_a_seed(hermes: Model) -> None:
    answer = hermes.client.chat.completions.create(
        model="tiny", messages=ASK, tools=[WEATHER], tool_choice=NAMED, n=3, seed=7, logprobs=True, top_logprobs=1
    )
    for choice in answer.choices:
        assert choice.message.tool_calls
        assert choice.logprobs is not None
        call = choice.message.tool_calls[0]
        assert call.type == "function"
        jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == sum(len(c.logprobs.content or ()) for c in answer.choices if c.logprobs)


def test_tools_that_cannot_work_are_refused(hermes: Model, bare: Model) -> None:
    assert refused_param(lambda: bare.chat(tools=[WEATHER], tool_choice="required")) == "tools"
    assert refused_param(lambda: bare.chat(tools=[WEATHER])) == "tool_choice", "nothing says how this model calls"
    other: Any = {"type": "function", "function": {"name": "other"}}
    assert refused_param(lambda: hermes.chat(tools=[WEATHER], tool_choice=other)) == "tool_choice"
    assert refused_param(lambda: hermes.chat(tools=[WEATHER, WEATHER])) == "tools"
    broken: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "objct"}}}
    assert refused_param(lambda: hermes.chat(tools=[broken], tool_choice="required")) == "tools"
    lark = {"guided_grammar": 'start: "a" | "b"'}
    assert refused_param(lambda: hermes.chat(tools=[WEATHER], extra_body=lark)) == "guided_grammar"


def test_a_response_format_beside_tools_constrains_answers_not_calls(hermes: Model) -> None:
    made = {"calls": 0, "answers": 0}
    for seed in range(12):
        body: Any = {"tools": [WEATHER, CLOCK], "response_format": VERDICT, "seed": seed}
        whole, streamed = hermes.chat(**body), hermes.stream(**body)[0]
        assert whole.message.content == streamed.message.content or not whole.message.content
        if whole.message.tool_calls:
            made["calls"] += 1
            assert whole.finish_reason == streamed.finish_reason == "tool_calls"
            calls = [c for choice in (whole, streamed) for c in choice.message.tool_calls]
            for call in calls:
                schema = PARAMETERS if call.function.name == "weather" else {"type": "object", "maxProperties": 0}
                jsonschema.validate(json.loads(call.function.arguments), schema)
        else:
            made["answers"] += 1
            jsonschema.validate(json.loads(whole.message.content), VERDICT["json_schema"]["schema"])
    assert min(made.values()) > 0, made


def test_a_response_format_lets_the_model_call_or_answer(hermes: Model) -> None:
    body: Any = {"tools": [WEATHER], "response_format": VERDICT}
    hermes.says(CALL)
    (call,) = hermes.chat(**body).message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Oslo", "days": 2}
    hermes.says('{"rain": true}')
    assert json.loads(hermes.chat(**body).message.content) == {"rain": True}


def test_a_forced_call_goes_before_a_response_format(hermes: Model) -> None:
    for choice in (NAMED, "required"):
        (call,) = hermes.chat(tools=[WEATHER], tool_choice=choice, response_format=VERDICT).message.tool_calls[:1]
        jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)


def test_a_regular_expression_goes_with_tools_too(hermes: Model) -> None:
    hermes.says("yes/no")
    answer = hermes.chat(tools=[WEATHER], extra_body={"guided_regex": "yes/(no|maybe)"})
    assert re.fullmatch("yes/(no|maybe)", answer.message.content)


def test_a_tokenizers_own_response_template_is_used(tokenizer_folder: Path, tmp_path: Path) -> None:
    call = {
        "open_pattern": r"CALL (?P<name>\w+)",
        "close": "END",
        "repeats": True,
        "content": "json",
        "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
    }
    template = {"start_anchor": "bot:", "fields": {"tool_calls": call, "content": {"content": "text"}}}
    chat_template = "{{ tools | tojson if tools }}{% for m in messages %}{{ m.content }}\n{% endfor %}bot:"
    for model in start(tokenizer_folder, tmp_path, chat_template, template):
        model.says('CALL weather {"city": "Rom", "days": 1} END')
        (made,) = model.chat(tools=[WEATHER]).message.tool_calls
        assert (made.function.name, json.loads(made.function.arguments)["city"]) == ("weather", "Rom")


# ---- structured output ------------------------------------------------------------------------------------


class Trip(pydantic.BaseModel):
    """What the client wants back."""

    model_config = pydantic.ConfigDict(extra="forbid")

    city: str = pydantic.Field(max_length=9)
    days: int = pydantic.Field(ge=1, le=30)


def test_the_clients_parse_gives_an_object(bare: Model) -> None:
    parsed = bare.client.chat.completions.parse(model="tiny", messages=ASK, response_format=Trip, seed=3)
    assert isinstance(parsed.choices[0].message.parsed, Trip)
    assert parsed.choices[0].finish_reason == "stop"
    streamed, _ = bare.stream(response_format=Trip, seed=3)
    assert streamed.message.parsed == parsed.choices[0].message.parsed


def test_json_object_and_vllms_constraints(bare: Model) -> None:
    bare.says('{"a": [1, true]}')
    assert json.loads(bare.chat(response_format={"type": "json_object"}).message.content) == {"a": [1, True]}
    bare.says("")
    constraints: dict[str, Any] = {
        "structured_outputs": {"choice": ["red", 'gr"ün']},
        "guided_choice": ["red", 'gr"ün'],
        "guided_regex": 'red|gr"ün',
        "guided_grammar": 'root ::= "red" | "gr\\"ün"',
    }
    for field, value in constraints.items():
        assert bare.chat(extra_body={field: value}).message.content in ("red", 'gr"ün'), field
        text = bare.client.completions.create(model="tiny", prompt="x", max_tokens=30, extra_body={field: value})
        assert text.choices[0].text in ("red", 'gr"ün'), field
    number = bare.chat(extra_body={"guided_json": {"type": "integer", "minimum": 3, "maximum": 5}})
    assert number.message.content in ("3", "4", "5")


def test_a_refused_schema_names_the_field(bare: Model) -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objct"}}}
    assert refused_param(lambda: bare.chat(response_format=schema)) == "response_format"


def test_grammars_work_with_n_stop_logprobs_and_streams(bare: Model) -> None:
    body: dict[str, Any] = {"extra_body": {"guided_regex": "[ab]{4}-[cd]{4}"}, "n": 2, "logprobs": True}
    answer = bare.client.chat.completions.create(model="tiny", messages=ASK, stop=["-"], **body)
    assert all(re.fullmatch("[ab]{4}", c.message.content or "") for c in answer.choices)
    assert all(c.logprobs for c in answer.choices)
    _, chunks = bare.stream(**body)
    texts = ["", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert all(re.fullmatch("[ab]{4}-[cd]{4}", text) for text in texts)


# ---- the rest -----------------------------------------------------------------------------------------------


def test_bad_words_and_allowed_tokens(bare: Model) -> None:
    bare.says("lazy dog lazy dog")
    text = bare.chat(extra_body={"bad_words": ["lazy"]}, max_tokens=8).message.content
    assert "lazy" not in text
    ids = bare.engine.tokenizer.encode("fox")
    bare.says("")
    token_ids = bare.chat(extra_body={"allowed_token_ids": ids, "return_token_ids": True}, max_tokens=8).token_ids
    assert set(token_ids) <= set(ids)


def test_reasoning_effort_reaches_a_template_that_uses_it(hermes: Model, bare: Model) -> None:
    hermes.says("Yes.")
    assert hermes.chat(reasoning_effort="low").message.content == "Yes."
    assert refused_param(lambda: bare.chat(reasoning_effort="low")) == "reasoning_effort"


def test_prompts_are_truncated_from_the_left(bare: Model) -> None:
    answer = bare.client.completions.create(
        model="tiny",
        prompt=[5, 6, 7, 8],
        max_tokens=2,
        extra_body={"truncate_prompt_tokens": 2, "return_token_ids": True},
    )
    assert answer.choices[0].prompt_token_ids == [7, 8]  # type: ignore[attr-defined]
    long = bare.client.completions.create(
        model="tiny", prompt=[5] * 1900, max_tokens=2, extra_body={"truncate_prompt_tokens": -1}
    )
    assert long.usage is not None
    assert long.usage.prompt_tokens == 1022
