# ruff: noqa: RUF001 (DeepSeek's tags have full-width bars)
"""DeepSeek-V3, R1 (arguments in a fence) and V3.1 (without)."""

from __future__ import annotations

from moe_serve.text.answer_format import NAMED_CALL, PLAIN, THINKING, AnswerFormat, passed_over

FORMAT = AnswerFormat(
    marks=("<｜tool▁call▁begin｜>",),
    tool_parsers=("deepseek_v3", "deepseek_v31"),
    reasoning_parsers=("deepseek_r1", "deepseek_v3"),
    template={
        "start_anchor": "<｜Assistant｜>",
        "fields": {
            "reasoning_content": THINKING,
            "tool_calls": {
                "open_pattern": r"\s*(?:<｜tool▁calls▁begin｜>\s*)?<｜tool▁call▁begin｜>"
                r"(?:function<｜tool▁sep｜>(?P<name>[^\n<]+)\n```json\n|(?!function<)(?P<name>[^\n<]+)<｜tool▁sep｜>)",
                "close_pattern": r"(?:\n```)?<｜tool▁call▁end｜>",
                "repeats": True,
                "content": "json",
                "transform": NAMED_CALL,
            },
            "calls_end": passed_over("<｜tool▁calls▁end｜>"),
            "content": PLAIN,
        },
    },
)
