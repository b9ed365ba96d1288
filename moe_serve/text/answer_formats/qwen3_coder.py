"""Qwen3-Coder, Qwen3.5 and after: the function and its parameters as tags."""

from __future__ import annotations

from moe_serve.text.answer_format import NAMED_CALL, PLAIN, THINKING, AnswerFormat

FORMAT = AnswerFormat(
    marks=("<function=", "<tool_call>"),
    without=("<arg_key>",),
    tool_parsers=("qwen3_coder", "qwen3_xml", "step3p5"),
    reasoning_parsers=("qwen3_coder",),
    template={
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "reasoning_content": THINKING,
            "tool_calls": {
                "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
                "close": "</tool_call>",
                "repeats": True,
                "content": "xml-inline",
                "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>"},
                "transform": NAMED_CALL,
            },
            "content": PLAIN,
        },
    },
)
