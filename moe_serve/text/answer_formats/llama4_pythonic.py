"""Llama 4 and others: the whole answer is a list of calls as Python writes them."""

from __future__ import annotations

from moe_serve.text.answer_format import LISTED_CALL, LLAMA_ANSWER, PLAIN, PYTHON_CALLS, AnswerFormat

FORMAT = AnswerFormat(
    marks=("[func_name",),
    tool_parsers=("llama4_pythonic", "pythonic"),
    template={
        "start_anchor_pattern": LLAMA_ANSWER,
        "fields": {
            "tool_calls": {
                "open_pattern": r"(?:\A|<\|python_start\|>)\s*(?=\[\s*[A-Za-z_][\w.]*\()",
                "content": PYTHON_CALLS,
                "transform": LISTED_CALL,
                "transform_each": True,
            },
            "content": PLAIN,
        },
    },
)
