"""The content blocks of a message, as an answer's deltas come: each change is an event. Knows no tokens and no HTTP.

Whole answers go through the same builder, so that they say what a stream would have said.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from moe_serve.server.endpoints.answers.answer_parsers import CallDelta, Delta

Event = dict[str, Any]
Block = dict[str, Any]


class ContentBlocks:
    """One answer's blocks. Each feed gives the events that a stream shows."""

    def __init__(self, with_thinking: bool, with_thoughts: bool) -> None:
        """`with_thinking`: there are thinking blocks. `with_thoughts`: they show their text."""
        self._blocks: list[Block] = []
        self._is_open = False
        self._arguments = ""
        """Of the open call, as they came."""
        self._with_thinking = with_thinking
        self._with_thoughts = with_thoughts
        self.thinking = ""
        """All of the reasoning, shown or not."""

    @property
    def content(self) -> list[Block]:
        """The blocks of a finished answer. A call that was cut off within its arguments is none."""
        return [block for block in self._blocks if block.get("input", {}) is not None]

    @property
    def has_calls(self) -> bool:
        return any(block["type"] == "tool_use" for block in self._blocks)

    def feed(self, delta: Delta) -> Iterator[Event]:
        """What some more text came to."""
        self.thinking += delta.reasoning
        if delta.reasoning and self._with_thinking:
            yield from self._think(delta.reasoning)
        if delta.content and (delta.content.strip() or self._goes_on("text")):
            yield from self._begin("text", text="")
            self._blocks[-1]["text"] += delta.content
            yield self._delta("text_delta", text=delta.content)
        for call in delta.calls:
            yield from self._call(call)

    def close(self) -> Iterator[Event]:
        """End the open block, if there is one."""
        if not self._is_open:
            return
        self._is_open = False
        block = self._blocks[-1]
        if block["type"] == "tool_use":
            block["input"] = _object(self._arguments)
        elif block["type"] == "thinking":
            block["signature"] = hashlib.sha256(block["thinking"].encode()).hexdigest()
            yield self._delta("signature_delta", signature=block["signature"])
        yield {"type": "content_block_stop", "index": len(self._blocks) - 1}

    def _think(self, text: str) -> Iterator[Event]:
        yield from self._begin("thinking", thinking="", signature="")
        if self._with_thoughts:
            self._blocks[-1]["thinking"] += text
            yield self._delta("thinking_delta", thinking=text)

    def _call(self, call: CallDelta) -> Iterator[Event]:
        if call.name is not None:
            yield from self.close()
            self._arguments = ""
            call_id = "toolu_" + (call.id or "").removeprefix("call_")
            yield from self._begin("tool_use", id=call_id, name=call.name, input={})
        self._arguments += call.arguments
        yield self._delta("input_json_delta", partial_json=call.arguments)

    def _goes_on(self, kind: str) -> bool:
        return self._is_open and self._blocks[-1]["type"] == kind

    def _begin(self, kind: str, **fields: Any) -> Iterator[Event]:
        """Open a block, unless one of this kind is open."""
        if self._goes_on(kind):
            return
        yield from self.close()
        self._is_open = True
        self._blocks.append({"type": kind, **fields})
        shown = dict(self._blocks[-1])
        yield {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": shown}

    def _delta(self, kind: str, **fields: Any) -> Event:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": {"type": kind, **fields}}


def _object(arguments: str) -> Any:
    """What a call's arguments say; None if they were cut off."""
    try:
        return json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return None
