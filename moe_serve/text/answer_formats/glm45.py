"""GLM-4.5 and after: a name, then keys and values in tags."""

from __future__ import annotations

from moe_serve.text.answer_format import NAMED_CALL, PLAIN, THINKING, AnswerFormat

FORMAT = AnswerFormat(
    marks=("<arg_key>", "<tool_call>"),
    tool_parsers=("glm45", "glm47"),
    reasoning_parsers=("glm45",),
    template={
        "start_anchor": "<|assistant|>",
        "fields": {
            "reasoning_content": THINKING,
            "tool_calls": {
                "open_pattern": r"\s*<tool_call>(?P<name>[^\s<]+)(?=\s*<)",
                "close": "</tool_call>",
                "repeats": True,
                "content": "xml-inline",
                "content_args": {
                    "tag_pattern": r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>"
                },
                "transform": NAMED_CALL,
            },
            "content": PLAIN,
        },
    },
)
