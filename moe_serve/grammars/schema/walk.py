"""The subschemas of a JSON schema, by its keywords: a `const` or an `enum` holds data, not schemas."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Path = tuple[str, ...]
Schema = dict[str, Any]

DATA = frozenset({"const", "enum", "default", "example", "examples", "x-guidance"})
NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
"""Keywords whose keys are names of the client's."""


def subschemas(root: Any) -> Iterator[tuple[Path, Schema]]:
    """(path, schema) of every schema at or below `root`, unknown keywords included: a $ref may point there."""
    stack: list[tuple[Path, Any, bool]] = [((), root, False)]
    while stack:
        path, value, is_map = stack.pop()
        if isinstance(value, list):
            stack.extend(((*path, str(i)), item, False) for i, item in enumerate(value))
        elif isinstance(value, dict):
            if not is_map:
                yield path, value
            for key, item in value.items():
                if is_map or key not in DATA:
                    stack.append(((*path, key), item, not is_map and key in NAMED))


def depth(value: Any) -> int:
    """How deep lists and objects are nested."""
    deepest, stack = 0, [(value, 1)]
    while stack:
        item, level = stack.pop()
        if isinstance(item, list | dict):
            deepest = max(deepest, level)
            stack.extend((inner, level + 1) for inner in (item.values() if isinstance(item, dict) else item))
    return deepest


def shown(path: Path, keyword: str) -> str:
    """Where a keyword stands, as a JSON pointer that is not too long to be read."""
    pointer = "/".join(("#", *path, keyword))
    return pointer if len(pointer) <= 120 else f"{pointer[:60]}...{pointer[-50:]}"
