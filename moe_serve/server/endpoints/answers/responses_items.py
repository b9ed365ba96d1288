"""The output items of a response, as an answer's deltas come: each change is an event. Knows no tokens and no HTTP.

Whole answers go through the same builder, so that they say what a stream would have said.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Iterator
from typing import Any

from moe_serve.server.endpoints.answers.answer_parsers import CallDelta, Delta

Event = dict[str, Any]
PART_EVENTS = {"output_text": "response.output_text", "reasoning_text": "response.reasoning_text"}


class OutputItems:
    """One answer's items. Each feed gives the events that a stream shows."""

    def __init__(self, custom: Collection[str] = ()) -> None:
        """`custom`: names of the tools whose input is text instead of JSON arguments."""
        self.items: list[dict[str, Any]] = []
        self._custom = custom
        self._arguments = ""
        """Of the open custom call: JSON around its input."""
        self._is_open = False
        self._logprobs: list[dict[str, Any]] = []
        """Of tokens that have not shown as text yet: what follows may turn them into a tag."""

    def feed(self, delta: Delta, logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        """Further text, and the log-probabilities of its tokens if they were asked for. A message shows them all."""
        self._logprobs += logprobs
        if delta.reasoning:
            yield from self._text("reasoning", "reasoning_text", delta.reasoning)
        if delta.content and (delta.content.strip() or self._goes_on("message")):
            yield from self._text("message", "output_text", delta.content)
        for call in delta.calls:
            yield from self._call(call)

    def close(self, status: str) -> Iterator[Event]:
        """End the open item, if there is one: "completed", or "incomplete" when the answer was cut off."""
        if not self._is_open:
            return
        self._is_open = False
        item = self.items[-1]
        item["status"] = status
        if item["type"] == "custom_tool_call":
            item["input"] = _input_in(self._arguments)
            yield self._event("response.custom_tool_call_input.delta", delta=item["input"])
            yield self._event("response.custom_tool_call_input.done", input=item["input"])
        elif item["type"] == "function_call":
            whole = {"name": item["name"], "arguments": item["arguments"]}
            yield self._event("response.function_call_arguments.done", **whole)
        else:
            part = item["content"][0]
            self._take_logprobs(part)
            logprobs = {"logprobs": list(part["logprobs"])} if part["type"] == "output_text" else {}
            yield self._event(f"{PART_EVENTS[part['type']]}.done", content_index=0, text=part["text"], **logprobs)
            yield self._event("response.content_part.done", content_index=0, part=_copy(part))
        yield {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": _copy(item)}

    @property
    def reasoning(self) -> str:
        """All of it."""
        return "".join(item["content"][0]["text"] for item in self.items if item["type"] == "reasoning")

    def _goes_on(self, kind: str) -> bool:
        return self._is_open and self.items[-1]["type"] == kind

    def _open(self, item: dict[str, Any]) -> Iterator[Event]:
        yield from self.close("completed")
        self._is_open = True
        self.items.append(item)
        yield {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": _copy(item)}

    def _take_logprobs(self, part: dict[str, Any]) -> dict[str, Any]:
        """Give a text part what is there; for the event about it."""
        if part["type"] != "output_text":
            return {}
        taken, self._logprobs = self._logprobs, []
        part["logprobs"] += taken
        return {"logprobs": taken}

    def _text(self, kind: str, part_kind: str, text: str) -> Iterator[Event]:
        if not self._goes_on(kind):
            head: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
            yield from self._open({"id": _new_id(kind), "type": kind, "status": "in_progress", "content": [], **head})
            part: dict[str, Any] = {"type": part_kind, "text": ""}
            if part_kind == "output_text":
                part |= {"annotations": [], "logprobs": []}
            self.items[-1]["content"].append(part)
            yield self._event("response.content_part.added", content_index=0, part=_copy(part))
        part = self.items[-1]["content"][0]
        part["text"] += text
        yield self._event(f"{PART_EVENTS[part_kind]}.delta", content_index=0, delta=text, **self._take_logprobs(part))

    def _call(self, call: CallDelta) -> Iterator[Event]:
        if call.name in self._custom:
            item = {"id": _new_id("ctc"), "type": "custom_tool_call", "status": "in_progress", "call_id": call.id}
            yield from self._open({**item, "name": call.name, "input": ""})
            self._arguments = ""
        elif call.name is not None:
            item = {"id": _new_id("fc"), "type": "function_call", "status": "in_progress", "call_id": call.id}
            yield from self._open({**item, "name": call.name, "arguments": ""})
        if self.items[-1]["type"] == "custom_tool_call":
            self._arguments += call.arguments
            return
        self.items[-1]["arguments"] += call.arguments
        yield self._event("response.function_call_arguments.delta", delta=call.arguments)

    def _event(self, kind: str, **more: Any) -> Event:
        return {"type": kind, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **more}


def _input_in(arguments: str) -> str:
    """A custom call's text; the arguments themselves where a model wrote them in another form."""
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    given = found.get("input") if isinstance(found, dict) else found
    return given if isinstance(given, str) else arguments


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex[:24]}"


def _copy(value: Any) -> Any:
    """An event keeps what was true when it was made."""
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value
