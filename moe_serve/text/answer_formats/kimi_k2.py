"""Kimi-K2 to K2.7: a section of calls, each with an id that holds the function's name and a number."""

from __future__ import annotations

from moe_serve.text.answer_format import NAMED_CALL, PLAIN, THINKING, AnswerFormat, passed_over

FORMAT = AnswerFormat(
    marks=("<|tool_call_begin|>", "<|tool_call_argument_begin|>"),
    tool_parsers=("kimi_k2",),
    reasoning_parsers=("kimi_k2",),
    template={
        "start_anchor": "<|im_assistant|>assistant<|im_middle|>",
        "fields": {
            "reasoning_content": THINKING,
            "tool_calls": {
                "open_pattern": r"\s*(?:<\|tool_calls_section_begin\|>\s*)?<\|tool_call_begin\|>\s*"
                r"(?P<id>(?:functions\.)?(?P<name>[\w.-]+?):\d+)\s*<\|tool_call_argument_begin\|>",
                "close": "<|tool_call_end|>",
                "repeats": True,
                "content": "json",
                "transform": {"id": "{id}", **NAMED_CALL},
            },
            "calls_end": passed_over(r"<\|tool_calls_section_end\|>"),
            "content": PLAIN,
        },
    },
)
