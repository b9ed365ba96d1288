"""Llama 3 and 4 by their own templates: the whole answer is one call as JSON, or several."""

from __future__ import annotations

from moe_serve.text.answer_format import JSON_CALLS, LISTED_CALL, LLAMA_ANSWER, PLAIN, AnswerFormat

FORMAT = AnswerFormat(
    marks=("dictionary of argument name and its value",),
    without=("[func_name", "<tool_call>", "[TOOL_CALLS]"),
    tool_parsers=("llama3_json", "llama4_json"),
    template={
        "start_anchor_pattern": LLAMA_ANSWER,
        "fields": {
            "tool_calls": {
                "open_pattern": r"(?:\A|<\|python_(?:start|tag)\|>)\s*(?=\[?\s*\{\s*\"(?:name|type|function)\")",
                "content": JSON_CALLS,
                "transform": LISTED_CALL,
                "transform_each": True,
            },
            "content": PLAIN,
        },
    },
)
