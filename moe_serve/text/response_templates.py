"""How a model's answers are to be read: which text is reasoning, which is a tool call.

transformers reads answers by a `response_template` that a tokenizer may bring. For tokenizers without
one whose chat template writes calls in the Hermes form (Qwen, Hermes and many others), here is that form.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from typing import Any

from transformers.utils.chat_parsing import ResponseParser
from transformers.utils.chat_parsing.response_templates import load_response_template

from moe_serve.text.tokenizer import Tokenizer

Template = Mapping[str, Any]
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Names that response templates use for it."""
HERMES_TAGS = ("<tool_call>", "</tool_call>")


def template_of(tokenizer: Tokenizer) -> Template | None:
    """The tokenizer's own template, or Hermes', or None where nothing tells how calls are written."""
    own = getattr(tokenizer.hf, "response_template", None)
    if own is None and _writes_hermes_calls(str(tokenizer.hf.chat_template or "")):
        own = _hermes()
    return None if own is None else _with_optional_fields(own, tokenizer)


def without_fields(template: Template, names: Collection[str]) -> Template | None:
    """The template without these fields; None when nothing but plain content is left to be found."""
    fields = {name: field for name, field in template["fields"].items() if name not in names}
    return {**template, "fields": fields} if set(fields) - {"content"} else None


def call_tags(template: Template) -> tuple[str, str] | None:
    """What a model writes before and after a call, where it writes each as one JSON object between two tags."""
    calls = template["fields"].get("tool_calls", {})
    opens, closes = HERMES_TAGS
    is_hermes = calls.get("content") == "json" and calls.get("close") == closes
    written = calls.get("open_pattern") or re.escape(calls.get("open", ""))
    return HERMES_TAGS if is_hermes and re.fullmatch(written, opens) else None


def start_parser(template: Template, prompt: str, tools: list[dict[str, Any]]) -> ResponseParser:
    """A parser that has read the start of the answer in the prompt, which may have opened the reasoning already."""
    spec = load_response_template(copy.deepcopy(dict(template)))
    is_answer_begun = spec.start_anchor_re.search(prompt) is not None
    return ResponseParser(spec, prefix=prompt if is_answer_begun else "", tools=list(tools))


def _writes_hermes_calls(chat_template: str) -> bool:
    return all(tag in chat_template for tag in HERMES_TAGS) and "<function=" not in chat_template


def _hermes() -> dict[str, Any]:
    """Calls as JSON between <tool_call> tags, reasoning between <think> tags."""
    call = {"type": "function", "function": "{content}"}
    return {
        "start_anchor_pattern": r"<\|im_start\|>assistant\n|<\|start_header_id\|>assistant<\|end_header_id\|>\n\n",
        "fields": {
            "reasoning_content": {"open_pattern": r"\s*<think>\n?", "close_pattern": r"\s*</think>", "content": "text"},
            "tool_calls": {
                "open_pattern": r"\s*<tool_call>",
                "close": "</tool_call>",
                "repeats": True,
                "content": "json",
                "transform": call,
            },
            "content": {"content": "text"},
        },
    }


def _with_optional_fields(template: Template, tokenizer: Tokenizer) -> Template:
    """A cut answer lacks fields, which is no error; content without an end of its own ends at an end token."""
    template = copy.deepcopy(dict(template))
    for field in template["fields"].values():
        field["optional"] = True
    content = template["fields"].get("content")
    ends = sorted(tokenizer.token_text(i) for i in tokenizer.eos_token_ids)
    if content is not None and ends and not {"close", "close_pattern"} & set(content):
        content["close"] = ends
    return template
