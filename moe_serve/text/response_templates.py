"""How a model's answers are to be read: which text is reasoning, which is a tool call.

transformers reads answers by a `response_template` that a tokenizer may bring. For tokenizers without one, the chat
template tells the format (`answer_formats/`), or the server's settings name it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from transformers.utils.chat_parsing import ResponseParser
from transformers.utils.chat_parsing.response_templates import load_response_template

from moe_serve.text import call_lists
from moe_serve.text.answer_format import ANSWER_END, AnswerFormat, Template
from moe_serve.text.parser_names import ParserNames, formats
from moe_serve.text.tokenizer import Tokenizer

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Names that response templates use for it."""
LEAST_BEGINNING = 4
"""Characters of a call's first tag that are nothing else."""
HERMES_TAGS = ("<tool_call>", "</tool_call>")


def template_of(tokenizer: Tokenizer, names: ParserNames | None = None) -> Template | None:
    """What `names` say, the tokenizer's own template, or that of the format its chat template shows. None where nothing
    tells how calls are written."""
    names = names or ParserNames()
    chat_template = str(tokenizer.hf.chat_template or "")
    found: Template | None = getattr(tokenizer.hf, "response_template", None)
    if names.tool_calls is not None:
        found = _named([f for f in formats() if names.tool_calls in f.tool_parsers], chat_template)
    elif found is None:
        found = next((form.template for form in formats() if form.fits(chat_template)), None)
    if names.reasoning is not None:
        other = _named([f for f in formats() if names.reasoning in f.reasoning_parsers], chat_template)
        found = _with_reasoning_of(other, found)
    return None if found is None else _with_optional_fields(found, tokenizer)


def _named(forms: list[AnswerFormat], chat_template: str) -> Template:
    """Of several formats with one name, that of the chat template."""
    return next((form for form in forms if form.fits(chat_template)), forms[0]).template


def _with_reasoning_of(other: Template, template: Template | None) -> Template:
    """`template` with the reasoning of `other`; without a template, `other` without its calls."""
    fields = {name: field for name, field in other["fields"].items() if name not in ("tool_calls", "calls_end")}
    if template is not None:
        fields = {**template["fields"], "reasoning_content": other["fields"]["reasoning_content"]}
    return {**(template or other), "fields": fields}


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


def _with_optional_fields(template: Template, tokenizer: Tokenizer) -> Template:
    """A cut answer lacks fields, which is no error. Content ends at the tokenizer's end tokens too, and so do calls
    without an end of their own, or with ANSWER_END in it."""
    call_lists.register()
    template = copy.deepcopy(dict(template))
    for field in template["fields"].values():
        field["optional"] = True
    ends = sorted(tokenizer.token_text(i) for i in tokenizer.eos_token_ids)
    for name in ("content", "tool_calls"):
        if ends and (field := template["fields"].get(name)) is not None:
            _end_at(field, ends, is_content=name == "content")
    return template


def _end_at(field: dict[str, Any], ends: list[str], is_content: bool) -> None:
    pattern, own = field.get("close_pattern"), field.get("close", [])
    if pattern is not None:
        field["close_pattern"] = pattern.replace(ANSWER_END, "|".join([ANSWER_END, *map(re.escape, ends)]))
    elif is_content or not own:
        field["close"] = sorted({*([own] if isinstance(own, str) else own), *ends})
