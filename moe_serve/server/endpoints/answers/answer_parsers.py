"""The text of a chat answer, as it comes, taken apart into content, reasoning and tool calls.

One parser per choice. Streamed and whole answers go through the same parser, so they say the same.
Knows text and transformers' ResponseParser; knows no tokens and no HTTP.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from transformers.utils.chat_parsing import ResponseParser

from moe_serve.text.response_templates import REASONING_FIELDS, CallSyntax


@dataclass(slots=True)
class CallDelta:
    """A new tool call (with `id` and `name`), or more of the arguments of the one at `index`."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None

    def as_json(self) -> dict[str, Any]:
        if self.name is None:
            return {"index": self.index, "function": {"arguments": self.arguments}}
        function = {"name": self.name, "arguments": self.arguments}
        return {"index": self.index, "id": self.id, "type": "function", "function": function}


@dataclass(slots=True)
class Delta:
    """What some more text came to."""

    content: str = ""
    reasoning: str = ""
    calls: list[CallDelta] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.calls)


class AnswerParser(Protocol):
    """Text in, deltas out; `is_last` with the last text, which may be empty."""

    def feed(self, text: str, is_last: bool) -> Delta: ...


class PlainText:
    """Everything is content."""

    def feed(self, text: str, is_last: bool) -> Delta:
        return Delta(text)


class NamedCall:
    """The text is the arguments of one function."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._is_begun = False

    def feed(self, text: str, is_last: bool) -> Delta:
        if self._is_begun:
            return Delta(calls=[CallDelta(0, text)] if text else [])
        self._is_begun = bool(text) or is_last
        return Delta(calls=[_new_call(0, self._name, text)] if self._is_begun else [])


class ListOfCalls:
    """The text is a list of {"name", "parameters"} objects; each is given out when it is complete.

    A call that was cut off is dropped: half of one is no call, and its syntax is no content. `finish_reason` says so.
    """

    def __init__(self) -> None:
        self._rest = ""
        self._count = 0
        self._decoder = json.JSONDecoder()

    def feed(self, text: str, is_last: bool) -> Delta:
        self._rest += text
        delta = Delta()
        while ("}" in text or is_last) and (start := self._rest.find("{")) >= 0:
            try:
                call, end = self._decoder.raw_decode(self._rest, start)
            except (ValueError, RecursionError):  # not all there yet
                break
            delta.calls.append(_new_call(self._count, call["name"], json.dumps(call["parameters"], ensure_ascii=False)))
            self._count += 1
            self._rest = self._rest[end:]
        return delta


class TemplateAnswer:
    """The model's own way to write, as its response template describes it.

    What the template cannot make sense of, such as a call that is no JSON, is shown as content.
    """

    def __init__(self, parser: ResponseParser, is_parallel: bool = True, calls: CallSyntax | None = None) -> None:
        """`calls`: how calls begin and end, to know one that was cut off."""
        self._parser: ResponseParser | None = parser
        self._calls = calls
        self._is_calling = False
        self._text = ""
        """All so far."""
        self._is_parallel = is_parallel
        self._count = 0
        self._raw = ""
        """Text that has not been given out yet."""

    def feed(self, text: str, is_last: bool) -> Delta:
        if self._parser is None:
            return Delta(text)
        self._raw += text
        self._text += text
        delta = Delta()
        try:
            self._take(self._parser.feed(text), delta)
            if is_last and not self._is_cut():
                self._take(self._parser.finalize()[1], delta)
        except Exception:  # the template's parsers raise whatever they come across
            self._parser = None
            delta.content += self._raw
        return delta

    def _is_cut(self) -> bool:
        """Whether the answer ends within a call: half of one is no call, and its syntax is no content."""
        if self._calls is None:
            return False
        if self._is_calling:
            return self._calls.is_open(self._text)
        return self._calls.may_begin(self._text)

    def _take(self, events: Iterable[dict[str, Any]], delta: Delta) -> None:
        for event in events:
            if event["field"] == "tool_calls":
                self._is_calling = event["type"] != "region_close"
            if event["type"] == "region_chunk" and not event["dirty"]:
                self._raw = self._raw[self._raw.find(event["text"]) + len(event["text"]) :]
                self._add_text(delta, event["field"], event["text"])
            elif event["type"] == "region_close" and event["field"] == "tool_calls":
                self._raw = ""
                delta.calls += self._calls_in(event["value"])

    @staticmethod
    def _add_text(delta: Delta, name: str, text: str) -> None:
        if name in REASONING_FIELDS:
            delta.reasoning += text
        elif name == "content":
            delta.content += text

    def _calls_in(self, value: Any) -> list[CallDelta]:
        found = []
        for item in value if isinstance(value, list) else [value]:
            name, arguments = item["function"]["name"], item["function"].get("arguments", {})
            if self._count and not self._is_parallel:
                continue
            text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            found.append(_new_call(self._count, str(name), text, item.get("id")))
            self._count += 1
        return found


def _new_call(index: int, name: str, arguments: str, own_id: str | None = None) -> CallDelta:
    """`own_id`: by which the model will know its call again (Kimi-K2)."""
    return CallDelta(index, arguments, own_id or f"call_{uuid.uuid4().hex[:24]}", name)
