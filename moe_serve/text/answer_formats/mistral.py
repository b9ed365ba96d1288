"""Mistral from 2025 on: each call with its name in front."""

from __future__ import annotations

from moe_serve.text.answer_format import ANSWER_END, NAMED_CALL, PLAIN, AnswerFormat

FORMAT = AnswerFormat(
    marks=("[TOOL_CALLS]", "[ARGS]"),
    tool_parsers=("mistral",),
    template={
        "start_anchor": "[/INST]",
        "fields": {
            "tool_calls": {
                "open_pattern": r"\s*\[TOOL_CALLS\](?P<name>[^\[\s]+)(?:\[CALL_ID\][^\[]*)?\[ARGS\]",
                "close_pattern": rf"(?=\[TOOL_CALLS\])|{ANSWER_END}",
                "repeats": True,
                "content": "json",
                "transform": NAMED_CALL,
            },
            "content": PLAIN,
        },
    },
)
