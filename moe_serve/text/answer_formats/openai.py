"""GPT-OSS (harmony): every message names its channel; a call names its function beside it."""

from __future__ import annotations

from moe_serve.text.answer_format import NAMED_CALL, AnswerFormat

FORMAT = AnswerFormat(
    marks=("<|channel|>", "<|start|>", "<|message|>"),
    tool_parsers=("openai",),
    reasoning_parsers=("openai_gptoss",),
    template={
        "start_anchor": "<|start|>assistant",
        "fields": {
            "reasoning_content": {
                "open_pattern": r"(?:<\|start\|>assistant)?<\|channel\|>analysis<\|message\|>",
                "close": ["<|end|>", "<|return|>"],
                "repeats": True,
                "content": "text",
            },
            "tool_calls": {
                "open_pattern": r"(?:<\|start\|>assistant)?(?: to=functions\.(?P<name>[\w.-]+)<\|channel\|>\w+"
                r"|<\|channel\|>\w+ to=functions\.(?P<name>[\w.-]+))[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>",
                "close": ["<|call|>", "<|end|>", "<|return|>"],
                "repeats": True,
                "content": "json",
                "transform": NAMED_CALL,
            },
            "content": {
                "open_pattern": r"(?:<\|start\|>assistant)?<\|channel\|>(?:final|commentary)<\|message\|>",
                "close": ["<|return|>", "<|end|>"],
                "repeats": True,
                "content": "text",
            },
        },
    },
)
