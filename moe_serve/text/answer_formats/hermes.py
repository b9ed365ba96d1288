"""Calls as JSON between <tool_call> tags: Qwen, Hermes and many others."""

from __future__ import annotations

from moe_serve.text.answer_format import PLAIN, AnswerFormat

FORMAT = AnswerFormat(
    marks=("<tool_call>", "</tool_call>"),
    without=("<arg_key>", "<function="),
    tool_parsers=("hermes", "qwen"),
    reasoning_parsers=("qwen3",),
    template={
        "start_anchor_pattern": r"<\|im_start\|>assistant\n|<\|start_header_id\|>assistant<\|end_header_id\|>\n\n",
        "fields": {
            "reasoning_content": {"open_pattern": r"\s*<think>\n?", "close_pattern": r"\s*</think>", "content": "text"},
            "tool_calls": {
                "open_pattern": r"\s*<tool_call>",
                "close": "</tool_call>",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": PLAIN,
        },
    },
)
