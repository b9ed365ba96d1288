# ruff: noqa: RUF001 (DeepSeek's tags have full-width bars)
"""Each family's way to write reasoning and calls: read whole, in pieces, and cut off anywhere."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from moe_serve.server.endpoints.answers.answer_parsers import TemplateAnswer
from moe_serve.text.response_templates import call_syntax, start_parser, template_of
from moe_serve.text.tokenizer import Tokenizer

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
        },
    }
    for name in ("weather", "clock")
]
ROME = ("weather", {"city": "Rome", "days": 3})
OSLO = ("clock", {"city": "Oslo"})


@dataclass(frozen=True)
class Case:
    """A family: what its chat template contains, the prompt's end, and an answer."""

    template: str
    prompt: str
    answer: str
    reasoning: str = "hm"
    content: str = ""
    calls: tuple[tuple[str, dict[str, Any]], ...] = (ROME, OSLO)


def arguments(call: tuple[str, dict[str, Any]]) -> str:
    return json.dumps(call[1])


CASES = {
    "glm": Case(
        "{name}<tool_call><arg_key>k</arg_key>",
        "<|user|>\nx<|assistant|>",
        "\n<think>hm</think>\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>clock\n"
        "<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n</tool_call>",
    ),
    "qwen coder": Case(
        "<tool_call><function=f>",
        "<|im_start|>assistant\n<think>\n",
        "hm\n</think>\n\n<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=clock>\n"
        "<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>",
    ),
    "minimax": Case(
        "<minimax:tool_call>",
        "]~b]ai\n<think>\n",
        'hm\n</think>\n\n<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Rome</parameter>\n'
        '<parameter name="days">3</parameter>\n</invoke>\n<invoke name="clock">\n'
        '<parameter name="city">Oslo</parameter>\n</invoke>\n</minimax:tool_call>',
    ),
    "deepseek v3": Case(
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>",
        "<｜User｜>x<｜Assistant｜><think>\n",
        "hm\n</think>\n\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        + arguments(ROME)
        + "\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>clock\n```json\n"
        + arguments(OSLO)
        + "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    "deepseek v3.1": Case(
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>",
        "<｜User｜>x<｜Assistant｜></think>",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
        + arguments(ROME)
        + "<｜tool▁call▁end｜><｜tool▁call▁begin｜>clock<｜tool▁sep｜>"
        + arguments(OSLO)
        + "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        reasoning="",
    ),
    "mistral": Case(
        "[TOOL_CALLS]",
        "[INST] x[/INST]",
        "[TOOL_CALLS] " + json.dumps([{"name": name, "arguments": given} for name, given in (ROME, OSLO)]) + "</s>",
        reasoning="",
    ),
    "mistral, named": Case(
        "[TOOL_CALLS][ARGS]",
        "[INST]x[/INST]",
        f"[TOOL_CALLS]weather[ARGS]{arguments(ROME)}[TOOL_CALLS]clock[ARGS]{arguments(OSLO)}</s>",
        reasoning="",
    ),
    "gpt-oss": Case(
        "<|start|><|channel|><|message|>",
        "<|start|>user<|message|>x<|end|><|start|>assistant",
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
        "<|constrain|>json<|message|>" + arguments(ROME) + "<|call|>",
        calls=(ROME,),
    ),
    "gpt-oss, an answer": Case(
        "<|start|><|channel|><|message|>",
        "<|start|>assistant",
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Hello!<|return|>",
        content="Hello!",
        calls=(),
    ),
    "glm, an answer": Case(
        "<tool_call><arg_key>", "<|assistant|>", "\n<think>hm</think>\nHello!", content="Hello!", calls=()
    ),
    "deepseek, an answer": Case(
        "<｜tool▁call▁begin｜>", "<｜Assistant｜><think>\n", "hm\n</think>\n\nHello!", content="Hello!", calls=()
    ),
}
SYNTAX = ("<tool_call>", "<arg_", "<function", "<invoke", "minimax", "tool▁", "[TOOL_CALLS]", "<|channel|>", "<think>")


class Read:
    """An answer as a client gets it, from text in pieces."""

    def __init__(self, tokenizer: Tokenizer, case: Case, answer: str, size: int) -> None:
        tokenizer.hf.chat_template = case.template
        template = template_of(tokenizer)
        assert template is not None
        parser = TemplateAnswer(start_parser(template, case.prompt, TOOLS), True, call_syntax(template))
        pieces = [answer[i : i + size] for i in range(0, len(answer), size)] or [""]
        deltas = [parser.feed(piece, i == len(pieces) - 1) for i, piece in enumerate(pieces)]
        self.reasoning = "".join(d.reasoning for d in deltas)
        self.content = "".join(d.content for d in deltas)
        self.calls = tuple((c.name, json.loads(c.arguments)) for d in deltas for c in d.calls)


@pytest.fixture
def own(tokenizer_folder: Any) -> Tokenizer:
    return Tokenizer.from_path(str(tokenizer_folder))


@pytest.mark.parametrize("size", [1, 3, 17, 10_000])
@pytest.mark.parametrize("name", CASES)
def test_reasoning_content_and_calls(own: Tokenizer, name: str, size: int) -> None:
    case = CASES[name]
    read = Read(own, case, case.answer, size)
    assert (read.reasoning.strip(), read.content.strip(), read.calls) == (case.reasoning, case.content, case.calls)


@pytest.mark.parametrize("size", [5, 10_000])
@pytest.mark.parametrize("name", CASES)
def test_cut_off_anywhere(own: Tokenizer, name: str, size: int) -> None:
    case = CASES[name]
    for end in range(0, len(case.answer), 3):
        read = Read(own, case, case.answer[:end], size)
        assert case.calls[: len(read.calls)] == read.calls, "no half of a call"
        assert not any(mark in read.content for mark in SYNTAX), case.answer[:end]


def test_an_unknown_format_is_said_to_be_unknown(own: Tokenizer) -> None:
    own.hf.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert template_of(own) is None
