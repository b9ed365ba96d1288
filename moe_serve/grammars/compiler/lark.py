"""Reads a Lark grammar as far as its rules and the JSON in it go. Knows llguidance's dialect; compiles nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from moe_serve.grammars.refusal import RefusedError

TOKEN = re.compile(
    r"""(?P<space>[ \t\r\f]+|//[^\n]*|\#[^\n]*|\\\n)
    |(?P<newline>\n\s*)
    |(?P<text>"(?:\\.|[^"\\\n])*"i?|/(?!/)(?:\\.|[^/\\\n])+/[imslux]*|<[^<>\s]*>)
    |(?P<json>%(?:json|regex)\s*(?=\{))
    |(?P<directive>%[a-z]\w*)
    |(?P<name>[!?]?@?[A-Za-z_][\w.-]*)
    |(?P<arrow>->\s*\w+)
    |(?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)

Item = bool | str | list[Any]
"""True: ends by itself; a rule's name; or a group of alternatives."""
Alternatives = list[list[Item]]


@dataclass(frozen=True, slots=True)
class Token:
    kind: str
    text: str
    starts_line: bool


@dataclass
class Grammar:
    """What was read."""

    rules: dict[str, Alternatives] = field(default_factory=dict)
    repeated: set[str] = field(default_factory=set)
    """Names that are defined more than once; nothing is said of those."""


def split_json(text: str) -> Iterator[tuple[str, str, Any]]:
    """(text before, its directive, value) of each `%json {...}` or `%regex {...}`; last what is left, with "".

    RefusedError: it is no JSON.
    """
    at = begin = 0
    while at < len(text):
        found = TOKEN.match(text, at)
        assert found is not None, "every character is some token"
        at = found.end()
        if found.lastgroup != "json":
            continue
        try:
            value, end = json.JSONDecoder().raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise RefusedError(f"what follows {found.group().strip()} is not valid JSON: {error}") from error
        yield text[begin : found.start()], found.group().strip(), value
        at = begin = end
    yield text[begin:], "", None


def tokens_of(text: str) -> list[Token]:
    """All but space and comments. `text` is without JSON: see split_json."""
    found, starts_line = [], True
    for match in TOKEN.finditer(text):
        if match.lastgroup == "newline":
            starts_line = True
        elif match.lastgroup != "space":
            found.append(Token(match.lastgroup or "", match.group(), starts_line))
            starts_line = False
    return found


def read(text: str) -> Grammar:
    """The rules of a text without JSON."""
    grammar = Grammar()
    for name, body in _definitions(tokens_of(text)):
        if name in grammar.rules:
            grammar.repeated.add(name)
        grammar.rules[name] = _Reader(body).alternatives()
    return grammar


def _definitions(tokens: list[Token]) -> Iterator[tuple[str, list[Token]]]:
    """(name, tokens after the colon) of each rule and terminal."""
    starts = [(i, colon) for i, colon in ((i, _colon(tokens, i)) for i in range(len(tokens))) if colon]
    edges = [i for i, token in enumerate(tokens) if token.starts_line and token.kind == "directive"]
    ends = sorted([*(i for i, _ in starts), *edges, len(tokens)])
    at = 0
    for i, colon in starts:
        while ends[at] <= i:
            at += 1
        yield tokens[i].text.lstrip("!?"), tokens[colon + 1 : ends[at]]


def _colon(tokens: list[Token], i: int) -> int:
    """Where the colon of a definition that begins at `i` stands; 0 if none begins there."""
    if not tokens[i].starts_line or tokens[i].kind != "name":
        return 0
    for j in range(i + 1, len(tokens)):
        if tokens[j].text == ":":
            return j
        if tokens[j].starts_line or tokens[j].text == "|":
            return 0
    return 0


class _Reader:
    """Reads what stands to the right of a colon."""

    def __init__(self, tokens: list[Token]) -> None:
        self._tokens = tokens
        self._at = 0

    def alternatives(self, closing: str = "") -> Alternatives:
        found: Alternatives = [[]]
        while self._at < len(self._tokens):
            token = self._tokens[self._at]
            self._at += 1
            if token.text == closing:
                break
            if token.text == "|":
                found.append([])
            elif token.kind == "arrow":
                continue
            else:
                found[-1].append(self._item(token))
        return found

    def _item(self, token: Token) -> Item:
        item: Item = True
        if token.text in ("(", "["):
            group = self.alternatives(")" if token.text == "(" else "]")
            item = True if token.text == "[" else group
        elif token.kind == "name":
            item = token.text
        return True if self._may_be_left_out() else item

    def _may_be_left_out(self) -> bool:
        """Whether what was just read may stand there no times."""
        following = "".join(token.text for token in self._tokens[self._at : self._at + 2])
        return following[:1] in ("*", "?") or re.match(r"[{~]0", following) is not None
