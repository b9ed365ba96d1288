"""Mistral and Mixtral: one list of calls."""

from __future__ import annotations

from moe_serve.text.answer_format import ANSWER_END, PLAIN, AnswerFormat

FORMAT = AnswerFormat(
    marks=("[TOOL_CALLS]",),
    without=("[ARGS]",),
    tool_parsers=("mistral",),
    template={
        "start_anchor": "[/INST]",
        "fields": {
            "tool_calls": {
                "open_pattern": r"\s*\[TOOL_CALLS\]\s*",
                "close_pattern": ANSWER_END,
                "content": "json",
                "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{arguments}"}},
                "transform_each": True,
            },
            "content": PLAIN,
        },
    },
)
