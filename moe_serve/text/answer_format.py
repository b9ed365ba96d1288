"""AnswerFormat: how one kind of model writes reasoning and tool calls. Data; knows no tokenizer and no model by name.

One file per format in moe_serve/text/answer_formats/, or one entry point of a package from outside. The template in it
is transformers' response template.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Template = Mapping[str, Any]
NAMED_CALL = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
"""A call whose name stands before its arguments."""
LISTED_CALL = {"type": "function", "function": {"name": "{name}", "arguments": "{arguments}"}}
"""One of a list of calls."""
THINKING = {"open_pattern": r"\s*<think>\n?", "close_pattern": r"\s*</think>\s*", "content": "text"}
PLAIN = {"content": "text"}
LLAMA_ANSWER = r"<\|(?:header_start|start_header_id)\|>assistant<\|(?:header_end|end_header_id)\|>\n\n"
"""Where an answer of Llama 4, or of Llama 3, begins."""
ANSWER_END = "</s>"
"""In a close_pattern: this, or any of the tokenizer's end tokens."""
PYTHON_CALLS, JSON_CALLS = "python-calls", "json-calls"
"""Readers of whole lists of calls (call_lists.py)."""


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """One format, its names, and how a chat template tells that a model writes it."""

    template: Template
    """Its field `reasoning_content` is reasoning, `tool_calls` are calls, `content` is the rest."""
    marks: tuple[str, ...]
    """All of these stand in the chat template, which shows a model its own earlier calls."""
    without: tuple[str, ...] = ()
    """None of these does: they mark a format that holds this one's marks as well."""
    tool_parsers: tuple[str, ...] = ()
    """Values of --tool-call-parser that mean this format; vLLM's names."""
    reasoning_parsers: tuple[str, ...] = ()
    """The same of --reasoning-parser."""

    def fits(self, chat_template: str) -> bool:
        """Whether a model with this chat template writes this format."""
        return all(mark in chat_template for mark in self.marks) and not any(m in chat_template for m in self.without)


def passed_over(tag: str) -> dict[str, Any]:
    """A field for a tag that says nothing by itself."""
    return {"open_pattern": rf"\s*{tag}", "close_pattern": "(?=.)", "repeats": True, "content": "text"}
