"""Which names of a set lead to an end: a name does when its own rule says so of those that it refers to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)


def ending(names: Iterable[Name], ends: Callable[[Name, Callable[[Name], bool]], bool]) -> set[Name]:
    """Names that end. `ends(name, known)` judges one, asking `known` about the others; each is judged again when one
    that it asked about turns out to end, so that a chain of N names takes N steps."""
    found: set[Name] = set()
    waiting_for: defaultdict[Name, set[Name]] = defaultdict(set)
    queue = list(names)
    while queue:
        name = queue.pop()
        if name in found:
            continue

        def known(other: Name, asker: Name = name) -> bool:
            if other not in found:
                waiting_for[other].add(asker)
            return other in found

        if ends(name, known):
            found.add(name)
            queue.extend(waiting_for.pop(name, ()))
    return found
