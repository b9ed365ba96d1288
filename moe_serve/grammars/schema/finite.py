"""Whether any finite JSON fits a schema: an object that requires itself has no end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moe_serve.grammars.fixpoint import ending
from moe_serve.grammars.schema.references import Missing, resolve
from moe_serve.grammars.schema.walk import subschemas


def has_finite_instance(document: Any) -> bool:
    """False only where it is certain; what cannot be followed counts as finite."""
    targets = {id(document): document}
    by_ref: dict[str, int] = {}
    for _, schema in subschemas(document):
        ref = schema.get("$ref")
        if isinstance(ref, str) and (found := resolve(document, ref)) is not Missing:
            by_ref[ref] = id(found)
            targets[id(found)] = found

    def ends(name: int, known: Callable[[int], bool]) -> bool:
        return _Judge(by_ref, known).is_finite(targets[name])

    return id(document) in ending(targets, ends)


class _Judge:
    """One look at a schema, with what is known of the references so far."""

    def __init__(self, by_ref: dict[str, int], known: Callable[[int], bool]) -> None:
        self._by_ref = by_ref
        self._known = known

    def is_finite(self, schema: Any) -> bool:
        if not isinstance(schema, dict):
            return True
        parts = [self._reference(schema), self._combination(schema), self._own(schema)]
        return all(parts)

    def _reference(self, schema: dict[str, Any]) -> bool:
        target = self._by_ref.get(schema["$ref"]) if isinstance(schema.get("$ref"), str) else None
        return target is None or self._known(target)

    def _combination(self, schema: dict[str, Any]) -> bool:
        some = [schema[key] for key in ("anyOf", "oneOf") if _is_list(schema.get(key))]
        every = schema["allOf"] if _is_list(schema.get("allOf")) else []
        return all(any([self.is_finite(s) for s in several]) for several in some) and all(map(self.is_finite, every))

    def _own(self, schema: dict[str, Any]) -> bool:
        kind = schema.get("type")
        if "const" in schema or "enum" in schema:
            return True
        if kind in ("object", ["object"]):
            return all(map(self.is_finite, _required(schema)))
        return all(map(self.is_finite, _first_items(schema))) if kind in ("array", ["array"]) else True


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


def _required(schema: dict[str, Any]) -> list[Any]:
    """Schemas of the properties that every object of this schema has."""
    required, properties = schema.get("required"), schema.get("properties")
    if not isinstance(required, list):
        return []
    named = properties if isinstance(properties, dict) else {}
    others = None if "patternProperties" in schema else schema.get("additionalProperties")
    return [named.get(name, others) for name in required if isinstance(name, str)]


def _first_items(schema: dict[str, Any]) -> list[Any]:
    """Schemas of the items that every array of this schema has."""
    least, first, items = schema.get("minItems"), schema.get("prefixItems"), schema.get("items")
    if not isinstance(least, int) or least < 1:
        return []
    if isinstance(items, list):  # draft 4
        first, items = items, schema.get("additionalItems")
    head = first[:least] if isinstance(first, list) else []
    return [*head, items] if least > len(head) else head
