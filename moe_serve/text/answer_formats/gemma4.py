"""Gemma 4: arguments as JSON whose keys have no quotes and whose strings have marks of their own."""

from __future__ import annotations

from moe_serve.text.answer_format import NAMED_CALL, AnswerFormat

FORMAT = AnswerFormat(
    marks=("<|tool_call>", "<tool_call|>"),
    tool_parsers=("gemma4",),
    reasoning_parsers=("gemma4",),
    template={
        "start_anchor": ["<|turn>model\n", "<tool_response|>"],
        "fields": {
            "reasoning_content": {
                "open_pattern": r"\s*<\|channel>thought\n?",
                "close": "<channel|>",
                "content": "text",
            },
            "tool_calls": {
                "open_pattern": r"\s*<\|tool_call>call:(?P<name>[\w.-]+)",
                "close": "<tool_call|>",
                "repeats": True,
                "content": "json",
                "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
                "transform": NAMED_CALL,
            },
            "content": {"close": ["<turn|>", "<|tool_response>"], "content": "text"},
        },
    },
)
