"""A client's Lark grammar, checked: its size, the schemas in it, and that some finite text follows it."""

from __future__ import annotations

import json
from collections.abc import Callable

from moe_serve.grammars.compiler import lark
from moe_serve.grammars.fixpoint import ending
from moe_serve.grammars.refusal import RefusedError
from moe_serve.grammars.schema import rewrite

MAX_RULES = 10_000
MAX_ALTERNATIVES = 15_000
"""Of one rule; the parser holds all of them at once."""
START = "start"


def checked(text: str) -> str:
    """The grammar, its schemas rewritten. RefusedError says what cannot be followed, and where."""
    rewritten, plain = [], []
    for before, directive, value in lark.split_json(text):
        plain.append(before)
        rewritten.append(before)
        if directive:
            plain.append(' "json" ')
            value = rewrite.checked(value) if directive.startswith("%json") else value
            rewritten.append(f"{directive} {json.dumps(value)}")
    _check_rules(lark.read("".join(plain)))
    return "".join(rewritten)


def _check_rules(grammar: lark.Grammar) -> None:
    rules = grammar.rules
    if len(rules) > MAX_RULES:
        raise RefusedError(f"it has {len(rules)} rules; at most {MAX_RULES} are followed")

    for name, alternatives in rules.items():
        if name.islower() and len(alternatives) > MAX_ALTERNATIVES:
            raise RefusedError(f"{name} has {len(alternatives)} alternatives; at most {MAX_ALTERNATIVES} are followed")

    def ends(name: str, known: Callable[[str], bool]) -> bool:
        is_open = name in grammar.repeated or name not in rules
        return is_open or any([_ends(alternative, known, rules) for alternative in rules[name]])

    if START in rules and START not in ending(rules, ends):
        raise RefusedError("no finite text follows it: a rule leads to itself without end")


def _ends(items: list[lark.Item], known: Callable[[str], bool], rules: dict[str, lark.Alternatives]) -> bool:
    for item in items:
        if isinstance(item, str) and item in rules and not known(item):
            return False
        if isinstance(item, list) and not any([_ends(inner, known, rules) for inner in item]):
            return False
    return True
