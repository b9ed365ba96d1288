"""The order in which a batch's tasks run: alike prompts together, much work first.

Tasks whose prompts begin alike run one after the other, so that the prefix cache computes the beginning once (BatchLLM,
2024). Groups with much work come first: what is left for the end is short, and the last steps are fuller.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile

from moe_serve.batches.tasks import Task

ALIKE_CHARS = 64
"""Two prompts that share so many characters at their beginnings share pages of keys and values."""
CHARS_PER_TOKEN = 4


def in_order(tasks: Iterable[Task]) -> list[Task]:
    """All of `tasks`, those that cannot run first."""
    groups: list[list[Task]] = []
    for task in sorted(tasks, key=lambda task: (task.problem is None, task.key, task.number)):
        if groups and _are_alike(groups[-1][-1].key, task.key):
            groups[-1].append(task)
        else:
            groups.append([task])
    groups.sort(key=_work, reverse=True)
    return [task for group in groups for task in group]


def _are_alike(one: str, other: str) -> bool:
    return len(one) >= ALIKE_CHARS and other.startswith(one[:ALIKE_CHARS])


def _work(group: Sequence[Task]) -> float:
    """Tokens that a group computes, its shared beginning once."""
    if group[0].problem is not None:
        return float("inf")
    shared = _common(group[0].key, group[-1].key) if len(group) > 1 else 0
    prompts = shared + sum(len(task.key) - shared for task in group)
    return prompts / CHARS_PER_TOKEN + sum(task.max_tokens for task in group)


def _common(one: str, other: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
