# ruff: noqa: RUF001 (DeepSeek's tags have full-width bars)
"""How model families write reasoning and tool calls, as transformers' response templates. Data; knows no tokenizer.

A family is known by what its chat template contains, since a template shows a model its own earlier calls. Where
nothing here fits, the format is unknown, and is said to be so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMED_CALL = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
THINKING = {"open_pattern": r"\s*<think>\n?", "close_pattern": r"\s*</think>\s*", "content": "text"}
PLAIN = {"content": "text"}


def passed_over(tag: str) -> dict[str, Any]:
    """A field for a tag that says nothing by itself."""
    return {"open_pattern": rf"\s*{tag}", "close_pattern": "(?=.)", "repeats": True, "content": "text"}


HERMES = {
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
}
"""Calls as JSON between <tool_call> tags (Qwen, Hermes and many others)."""
GLM = {
    "start_anchor": "<|assistant|>",
    "fields": {
        "reasoning_content": THINKING,
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>(?P<name>[^\s<]+)(?=\s*<)",
            "close": "</tool_call>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>"},
            "transform": NAMED_CALL,
        },
        "content": PLAIN,
    },
}
"""GLM-4.5 and after: a name, then keys and values in tags."""
QWEN_CODER = {
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
}
"""Qwen3-Coder: the function and its parameters as tags."""
MINIMAX = {
    "start_anchor": "]~b]ai\n",
    "fields": {
        "reasoning_content": THINKING,
        "tool_calls": {
            "open_pattern": r'\s*(?:<minimax:tool_call>\s*)?<invoke name="(?P<name>[^"]+)">',
            "close": "</invoke>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r'<parameter name="(?P<key>[^"]+)">(?P<value>.*?)</parameter>'},
            "transform": NAMED_CALL,
        },
        "calls_end": passed_over("</minimax:tool_call>"),
        "content": PLAIN,
    },
}
"""MiniMax-M2: one block of invocations."""
DEEPSEEK = {
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
}
"""DeepSeek-V3, R1 (arguments in a fence) and V3.1 (without)."""
MISTRAL_LIST = {
    "start_anchor": "[/INST]",
    "fields": {
        "tool_calls": {
            "open_pattern": r"\s*\[TOOL_CALLS\]\s*",
            "close": "</s>",
            "content": "json",
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{arguments}"}},
            "transform_each": True,
        },
        "content": PLAIN,
    },
}
"""Mistral and Mixtral: one list of calls."""
MISTRAL_NAMED = {
    "start_anchor": "[/INST]",
    "fields": {
        "tool_calls": {
            "open_pattern": r"\s*\[TOOL_CALLS\](?P<name>[^\[\s]+)(?:\[CALL_ID\][^\[]*)?\[ARGS\]",
            "close_pattern": r"(?=\[TOOL_CALLS\])|</s>",
            "repeats": True,
            "content": "json",
            "transform": NAMED_CALL,
        },
        "content": PLAIN,
    },
}
"""Mistral from 2025 on: each call with its name in front."""
HARMONY = {
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
}
"""GPT-OSS: every message names its channel; a call names its function beside it."""

FORMATS: tuple[tuple[tuple[str, ...], Mapping[str, Any]], ...] = (
    (("<|channel|>", "<|start|>", "<|message|>"), HARMONY),
    (("<arg_key>", "<tool_call>"), GLM),
    (("<function=", "<tool_call>"), QWEN_CODER),
    (("<minimax:tool_call>",), MINIMAX),
    (("<｜tool▁call▁begin｜>",), DEEPSEEK),
    (("[TOOL_CALLS]", "[ARGS]"), MISTRAL_NAMED),
    (("[TOOL_CALLS]",), MISTRAL_LIST),
    (("<tool_call>", "</tool_call>"), HERMES),
)
"""(all of what a chat template must contain, the format), the most particular first."""
