# ruff: noqa: RUF001 (DeepSeek's tags have full-width bars)
"""Every answer format through the official openai client, whole and streamed: what a scripted model writes in it, in
tokens of a few characters, comes out as reasoning, content and calls.

Each case has the chat template's part that shows the model its own earlier calls, and writes answers with it: so a
conversation that goes on is rendered in the form in which the answer was read.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_serve.errors import ConfigError
from moe_serve.server.run import say_how_answers_are_read
from moe_serve.text.answer_formats import FORMATS
from moe_serve.text.parser_names import ParserNames, formats, tool_parser_names
from moe_serve.text.response_templates import template_of
from moe_serve.text.tokenizer import Tokenizer
from tests.server.scripted_model import ASK, Model, start

Call = tuple[str, dict[str, Any]]
Writes = Callable[[list[Call]], str]
PROPERTIES = {
    "city": {"type": "string"},
    "days": {"type": "integer"},
    "exact": {"type": "boolean"},
    "area": {"type": "object"},
    "tags": {"type": "array"},
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": PROPERTIES}}}
    for name in ("weather", "get-clock")
]
ROME: Call = ("weather", {"city": "Rome", "days": 3})
OSLO: Call = ("get-clock", {"city": "Oslo"})
HARD: Call = (
    "weather",
    {
        "city": 'Zürich "Höngg" \\ 東京 🌧\nsecond line',
        "exact": True,
        "area": {"box": [1, [2.5, {"a": None}]], "name": "a}]b"},
        "tags": ["x", "y, z", ""],
    },
)
UNKNOWN: Call = ("not_a_tool", {"city": "Bonn"})


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else as_json(value)


def tagged(opens: str, key: str, closes: str, between: str = "\n") -> Writes:
    """Calls whose arguments stand in tags: `opens` with the name, `key` with a key and a value."""

    def written(calls: list[Call]) -> str:
        return between.join(
            opens.replace("NAME", name)
            + "".join(key.replace("KEY", k).replace("VALUE", as_text(v)) for k, v in given.items())
            + closes
            for name, given in calls
        )

    return written


def around(opens: str, closes: str, inside: Writes) -> Writes:
    return lambda calls: opens + inside(calls) + closes


def json_after(opens: str, closes: str, between: str = "") -> Writes:
    """Calls whose arguments are JSON behind the name; N stands for a call's number."""
    return lambda calls: between.join(
        opens.replace("NAME", name).replace("N#", str(i)) + as_json(given) + closes
        for i, (name, given) in enumerate(calls)
    )


def gemma(value: Any) -> str:
    if isinstance(value, str):
        return f'<|"|>{value}<|"|>'
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{gemma(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(gemma, value)) + "]"
    return as_json(value)


def python(calls: list[Call]) -> str:
    listed = (f"{name}({', '.join(f'{k}={v!r}' for k, v in given.items())})" for name, given in calls)
    return "[" + ", ".join(listed) + "]"


def harmony(calls: list[Call]) -> str:
    head = "<|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>"
    return json_after(head, "<|call|>")(calls)


@dataclass(frozen=True)
class Case:
    """One format: its file, what its chat template shows, and how a model writes in it."""

    file: str
    marks: str
    prompt: str
    """The end of the prompt, which may have opened the reasoning."""
    calls: Writes
    reasons: str | None = "<think>\nHm, R.\n</think>\n\n"
    """None: the format has no reasoning."""
    answers: str = "A"
    names: tuple[str, str] = ("weather", "get-clock")
    writes_before_calls: bool = True
    """Content may stand before calls."""


THINK_OPEN = "Hm, R.\n</think>\n\n"
FENCE = "```"
CASES = {
    "hermes": Case(
        "hermes",
        "<tool_call></tool_call>",
        "<|im_start|>assistant\n",
        lambda calls: "\n".join(f"<tool_call>\n{as_json({'name': n, 'arguments': a})}\n</tool_call>" for n, a in calls),
    ),
    "glm45": Case(
        "glm45",
        "<tool_call><arg_key>",
        "<|assistant|>",
        tagged("<tool_call>NAME\n", "<arg_key>KEY</arg_key>\n<arg_value>VALUE</arg_value>\n", "</tool_call>"),
    ),
    "qwen3_coder": Case(
        "qwen3_coder",
        "<tool_call><function=",
        "<|im_start|>assistant\n<think>\n",
        tagged("<tool_call>\n<function=NAME>\n", "<parameter=KEY>\nVALUE\n</parameter>\n", "</function>\n</tool_call>"),
        THINK_OPEN,
    ),
    "minimax_m2": Case(
        "minimax_m2",
        "<minimax:tool_call>",
        "]~b]ai\n<think>\n",
        around(
            "<minimax:tool_call>\n",
            "\n</minimax:tool_call>",
            tagged('<invoke name="NAME">\n', '<parameter name="KEY">VALUE</parameter>\n', "</invoke>"),
        ),
        THINK_OPEN,
    ),
    "deepseek_v3": Case(
        "deepseek_v3",
        "<｜tool▁call▁begin｜>",
        "<｜Assistant｜><think>\n",
        around(
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁calls▁end｜>",
            json_after(
                f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n{FENCE}json\n", f"\n{FENCE}<｜tool▁call▁end｜>", "\n"
            ),
        ),
        THINK_OPEN,
    ),
    "deepseek_v31": Case(
        "deepseek_v3",
        "<｜tool▁call▁begin｜>",
        "<｜Assistant｜><think>",
        around(
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁calls▁end｜>",
            json_after("<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
        ),
        THINK_OPEN,
    ),
    "kimi_k2": Case(
        "kimi_k2",
        "<|tool_call_begin|><|tool_call_argument_begin|>",
        "<|im_assistant|>assistant<|im_middle|>",
        around(
            "<|tool_calls_section_begin|>",
            "<|tool_calls_section_end|>",
            json_after("<|tool_call_begin|>functions.NAME:N#<|tool_call_argument_begin|>", "<|tool_call_end|>"),
        ),
    ),
    "mistral": Case("mistral", "[TOOL_CALLS][ARGS]", "[INST]x[/INST]", json_after("[TOOL_CALLS]NAME[ARGS]", ""), None),
    "mistral_list": Case(
        "mistral_list",
        "[TOOL_CALLS]",
        "[INST] x[/INST]",
        lambda calls: "[TOOL_CALLS] " + as_json([{"name": n, "arguments": a} for n, a in calls]),
        None,
    ),
    "openai": Case(
        "openai",
        "<|start|><|channel|><|message|>",
        "<|start|>assistant",
        harmony,
        "<|channel|>analysis<|message|>Hm, R.<|end|>",
        "<|start|>assistant<|channel|>final<|message|>A",
    ),
    "gemma4": Case(
        "gemma4",
        "<|tool_call><tool_call|>",
        "<|turn>model\n",
        lambda calls: "".join(f"<|tool_call>call:{n}{gemma(a)}<tool_call|>" for n, a in calls),
        "<|channel>thought\nHm, R.\n<channel|>",
    ),
    "llama4_pythonic": Case(
        "llama4_pythonic",
        "[func_name1(",
        "<|header_start|>assistant<|header_end|>\n\n",
        python,
        None,
        names=("weather", "get_clock"),
        writes_before_calls=False,
    ),
    "llama3_json": Case(
        "llama3_json",
        "dictionary of argument name and its value",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        lambda calls: "; ".join(as_json({"name": n, "parameters": a}) for n, a in calls),
        None,
        writes_before_calls=False,
    ),
}
SYNTAX = (
    "tool_call",
    "<arg_",
    "<function",
    "<invoke",
    "<param",
    "tool▁",
    "TOOL_CALLS",
    "<|channel",
    "<think>",
    "{",
    "=",
)
REASONING = "Hm, R."


def named(case: Case, calls: list[Call]) -> list[Call]:
    """The calls under names that the format can write."""
    return [(case.names[1] if name == OSLO[0] else name, given) for name, given in calls]


def chat_template(case: Case) -> str:
    """Shows tools, what was said, and calls made before in the format's own way."""
    shown = case.marks.replace("'", "")
    return (
        "{% if tools %}{{ '" + shown + "' }}{% for t in tools %}{{ t.function.name }}{% endfor %}{% endif %}"
        "{% for m in messages %}{{ m.role }}: {{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}{{ c.id }} {{ c.function.name }}{% endfor %}\n{% endfor %}"
        "{{ '" + case.prompt.replace("\n", "\\n") + "' }}"
    )


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def model(case: Case, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    yield from start(tokenizer_folder, tmp_path_factory.mktemp("format"), chat_template(case))


def both(model: Model, **body: Any) -> list[Any]:
    """The choice of a whole answer, and of the same answer streamed."""
    body = {"tools": TOOLS, "max_tokens": 700, **body}
    return [model.chat(**body), model.stream(**body)[0]]


def calls_of(choice: Any) -> list[Call]:
    return [(c.function.name, json.loads(c.function.arguments)) for c in choice.message.tool_calls or []]


def text_of(choice: Any) -> tuple[str, str]:
    message = choice.message
    return (getattr(message, "reasoning_content", None) or "").strip(), (message.content or "").strip()


def test_every_format_has_a_case() -> None:
    assert {case.file for case in CASES.values()} == set(FORMATS.names())


def test_reasoning_and_two_calls(model: Model, case: Case) -> None:
    wanted = named(case, [ROME, OSLO])
    model.says((case.reasons or "") + case.calls(wanted))
    for choice in both(model):
        assert calls_of(choice) == wanted
        assert text_of(choice) == (REASONING if case.reasons else "", "")
        assert choice.finish_reason == "tool_calls"
        assert len({c.id for c in choice.message.tool_calls}) == 2
    single = both(model, parallel_tool_calls=False)
    assert [len(calls_of(choice)) for choice in single] == [1, 1]


def test_reasoning_and_an_answer(model: Model, case: Case) -> None:
    answer = "It rains: 3 < 4 & [so] {on}."
    model.says(
        (case.reasons or "") + case.answers.replace("A", answer, 1)
        if case.answers != "A"
        else (case.reasons or "") + answer
    )
    for tools in ({}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": TOOLS}):
        for choice in (model.chat(**tools), model.stream(**tools)[0]):
            assert text_of(choice) == (REASONING if case.reasons else "", answer)
            assert (choice.finish_reason, choice.message.tool_calls) == ("stop", None)


def test_text_before_a_call_is_content(model: Model, case: Case) -> None:
    if not case.writes_before_calls:
        pytest.skip("the whole answer is calls")
    before = case.answers[:-1] + "Let me see."
    end = "<|end|>" if case.file == "openai" else "\n"
    model.says(before + end + case.calls([ROME]))
    if "<think>" in case.prompt:
        model.says("</think>" + before + end + case.calls([ROME]))
    for choice in both(model):
        assert calls_of(choice) == [ROME]
        assert text_of(choice)[1] == "Let me see."


def test_escapes_other_scripts_and_nested_values(model: Model, case: Case) -> None:
    model.says(_answer(case, case.calls([HARD])))
    for choice in both(model):
        assert calls_of(choice) == [HARD]


def test_a_function_that_is_no_tool_is_still_a_call(model: Model, case: Case) -> None:
    """As with other servers: the client knows what to say to the model."""
    model.says(_answer(case, case.calls([UNKNOWN])))
    for choice in both(model):
        assert calls_of(choice) == [UNKNOWN]


def test_pieces_of_streamed_arguments_make_valid_json(model: Model, case: Case) -> None:
    wanted = named(case, [ROME, OSLO])
    model.says(_answer(case, case.calls(wanted)))
    _, chunks = model.stream(tools=TOOLS)
    arguments: dict[int, str] = {}
    for delta in (d for c in chunks if c.choices for d in c.choices[0].delta.tool_calls or []):
        arguments[delta.index] = arguments.get(delta.index, "") + delta.function.arguments
    assert [json.loads(text) for text in arguments.values()] == [given for _, given in wanted]


def test_a_call_that_is_cut_off(model: Model, case: Case) -> None:
    """Half of a call is none, its syntax is no content, and the client is told `length`."""
    text = _answer(case, case.calls([ROME]))
    model.says(text)
    half = len(model.engine.tokenizer.encode(text[: text.index("Rome") + 3]))
    for cut in (half // 2, half):
        whole = model.chat(tools=TOOLS, max_tokens=cut)
        assert (whole.finish_reason, calls_of(whole)) == ("length", [])
        body: Any = {"model": "tiny", "messages": ASK, "tools": TOOLS, "max_tokens": cut, "stream": True}
        choices = [c for chunk in model.client.chat.completions.create(**body) for c in chunk.choices]
        assert choices[-1].finish_reason == "length"
        assert not any(choice.delta.tool_calls for choice in choices)
        for content in (text_of(whole)[1], "".join(choice.delta.content or "" for choice in choices)):
            assert not any(mark in content for mark in SYNTAX), content


def test_forced_calls_do_not_need_the_format(model: Model) -> None:
    model.says("")
    clock: Any = {"type": "function", "function": {"name": "clock"}}
    for choice in both(model, tools=[clock], tool_choice="required", parallel_tool_calls=False):
        assert calls_of(choice) == [("clock", {})]
        assert choice.finish_reason == "tool_calls"
    for choice in both(model, tools=[clock], tool_choice={"type": "function", "function": {"name": "clock"}}):
        assert calls_of(choice) == [("clock", {})]
        assert choice.finish_reason == "stop"


def test_the_conversation_goes_on(model: Model, case: Case) -> None:
    model.says(_answer(case, case.calls([ROME])))
    message = model.chat(tools=TOOLS).message
    model.says(_answer(case, case.answers))
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    choice = model.chat(messages=[*ASK, message.model_dump(exclude_none=True), result], tools=TOOLS)
    assert text_of(choice)[1] == "A"


def _answer(case: Case, text: str) -> str:
    """`text` behind what ends the reasoning that the prompt has opened."""
    return "</think>" + text if "<think>" in case.prompt else text


def test_kimis_ids_come_back(tokenizer_folder: Path, tmp_path: Path) -> None:
    case = CASES["kimi_k2"]
    for model in start(tokenizer_folder, tmp_path, chat_template(case)):
        model.says(case.calls([ROME, OSLO]))
        ids = [call.id for call in model.chat(tools=TOOLS).message.tool_calls]
        assert ids == ["functions.weather:0", "functions.get-clock:1"]


@pytest.mark.parametrize("name", CASES)
def test_a_chat_template_fits_one_format(name: str) -> None:
    fitting = [form for form in formats() if form.fits(chat_template(CASES[name]))]
    assert fitting == [FORMATS.find(CASES[name].file)]


@pytest.mark.parametrize("name", CASES)
def test_a_format_is_found_by_name(name: str, tokenizer_folder: Path) -> None:
    tokenizer = Tokenizer.from_path(str(tokenizer_folder))
    tokenizer.hf.chat_template = "{{ messages }}"
    assert template_of(tokenizer) is None
    found = template_of(tokenizer, ParserNames(tool_calls=FORMATS.find(CASES[name].file).tool_parsers[0]))
    assert found is not None
    assert "tool_calls" in found["fields"]


def test_an_unknown_template_is_said_at_the_start(tokenizer_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = Tokenizer.from_path(str(tokenizer_folder))
    for template, count in (("{{ messages }}", 1), (chat_template(CASES["hermes"]), 0)):
        tokenizer.hf.chat_template = template
        service: Any = SimpleNamespace(tokenizer=tokenizer, response_template=template_of(tokenizer))
        caplog.clear()
        with caplog.at_level(logging.INFO, "moe_serve"):
            say_how_answers_are_read(service)
        assert caplog.text.count("--tool-call-parser names a format: deepseek_v3,") == count


def test_names_are_checked_and_combined(tokenizer_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"--tool-call-parser: 'qwn' is not one of .*hermes"):
        ParserNames(tool_calls="qwn").check()
    with pytest.raises(ConfigError, match=r"--reasoning-parser: 'x' is not one of .*deepseek_r1"):
        ParserNames(reasoning="x").check()
    for name in tool_parser_names():
        ParserNames(tool_calls=name).check()
    tokenizer = Tokenizer.from_path(str(tokenizer_folder))
    mixed = template_of(tokenizer, ParserNames("mistral", "deepseek_r1"))
    alone = template_of(tokenizer, ParserNames(reasoning="minimax_m2"))
    assert mixed is not None
    assert alone is not None
    assert {"reasoning_content", "tool_calls"} <= set(mixed["fields"])
    assert set(alone["fields"]) == {"reasoning_content", "content"}
