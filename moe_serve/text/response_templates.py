"""How a model's answers are to be read: which text is reasoning, which is a tool call.

transformers reads answers by a `response_template` that a tokenizer may bring. For tokenizers without one, the chat
template tells the family's format (`response_formats.py`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from transformers.utils.chat_parsing import ResponseParser
from transformers.utils.chat_parsing.response_templates import load_response_template

from moe_serve.text.response_formats import FORMATS
from moe_serve.text.tokenizer import Tokenizer

Template = Mapping[str, Any]
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Names that response templates use for it."""
LEAST_BEGINNING = 4
"""Characters of a call's first tag that are nothing else."""
HERMES_TAGS = ("<tool_call>", "</tool_call>")


def template_of(tokenizer: Tokenizer) -> Template | None:
    """The tokenizer's own template, or that of its family, or None where nothing tells how calls are written."""
    own = getattr(tokenizer.hf, "response_template", None)
    if own is None:
        own = _known_format(str(tokenizer.hf.chat_template or ""))
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


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """What begins a call, what ends it, and what begins anything, as patterns of the `regex` library."""

    begin: Any
    end: Any
    tags: tuple[Any, ...]

    def is_open(self, text: str) -> bool:
        """Whether text that has begun a call lacks its end. Where only the answer's end ends calls, none is open."""
        return self.end is not None and not any(not text[m.end() :].strip() for m in self.end.finditer(text))

    def may_begin(self, text: str) -> bool:
        """Whether text ends with a call's beginning, or with most of a tag."""
        if any(m.end() == len(text) for m in self.begin.finditer(text)):
            return True
        return any(self._ends_with_most_of(tag, text) for tag in self.tags)

    @staticmethod
    def _ends_with_most_of(tag: Any, text: str) -> bool:
        found = tag.search(text, max((m.end() for m in tag.finditer(text)), default=0), partial=True)
        return found is not None and found.partial and len(found.group().strip()) >= LEAST_BEGINNING


def call_syntax(template: Template) -> CallSyntax | None:
    """None where the template has no calls."""
    fields = load_response_template(copy.deepcopy(dict(template))).fields
    calls = fields.get("tool_calls")
    if calls is None or calls.open_re is None:
        return None
    return CallSyntax(calls.open_re, calls.close_re, tuple(f.open_re for f in fields.values() if f.open_re is not None))


def start_parser(template: Template, prompt: str, tools: list[dict[str, Any]]) -> ResponseParser:
    """A parser that has read the start of the answer in the prompt, which may have opened the reasoning already."""
    spec = load_response_template(copy.deepcopy(dict(template)))
    is_answer_begun = spec.start_anchor_re.search(prompt) is not None
    return ResponseParser(spec, prefix=prompt if is_answer_begun else "", tools=list(tools))


def _known_format(chat_template: str) -> Template | None:
    """The format of the family whose chat template this is."""
    return next((form for marks, form in FORMATS if all(mark in chat_template for mark in marks)), None)


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
