"""What the clients of soak.py send: random requests, good and bad, and how each client behaves."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

BAD = 0.04
"""Fraction of requests that must be refused with a 4xx."""
WORDS = (
    "the",
    "a",
    "of",
    "and",
    "to",
    "in",
    "was",
    "he",
    "she",
    "it",
    "that",
    "his",
    "with",
    "as",
    "for",
    "had",
    "not",
)
OPENING = "Once upon a time there lived, at the edge of a great and quiet forest, a clockmaker who " * 4
"""Shared by a third of the prompts, so that the prefix cache has work."""


class Fate(StrEnum):
    """How a client treats its request. 70 % stay, 15 % hang up in the stream, 15 % leave early."""

    STAY = "stay"
    HANG_UP = "hang_up"
    LEAVE_EARLY = "leave_early"


@dataclass(frozen=True)
class Plan:
    """One request and what its client will do."""

    path: str
    body: dict[str, Any]
    content: bytes
    fate: Fate = Fate.STAY
    leave_after: int = 0
    """Events read before hanging up."""
    patience_s: float = 0.0
    """How long a client that leaves early waits; mostly less than a first token takes."""
    expect_refusal: bool = False

    @property
    def headers(self) -> dict[str, str]:
        return {"content-type": "application/json"}

    @property
    def num_choices(self) -> int:
        return int(self.body.get("n", 1))


def make_plan(rng: random.Random) -> Plan:
    """A valid request of any kind."""
    path, body = _prompt(rng)
    body |= _sampling(rng)
    fate = rng.choices((Fate.STAY, Fate.HANG_UP, Fate.LEAVE_EARLY), (70, 15, 15))[0]
    if fate is Fate.HANG_UP or rng.random() < 0.8:
        body["stream"] = True
        if rng.random() < 0.3:
            body["stream_options"] = {"include_usage": True}
    content = json.dumps(body).encode()
    return Plan(path, body, content, fate, rng.randint(1, 30), rng.choice((0.0, 0.001, 0.01, 0.05, 0.3)))


def _prompt(rng: random.Random) -> tuple[str, dict[str, Any]]:
    length = int(2 ** rng.uniform(0, 9))
    text = (OPENING if rng.random() < 0.33 else "") + " ".join(rng.choices(WORDS, k=length))
    if rng.random() < 0.5:
        return "/v1/completions", {"prompt": text}
    return "/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}


def _sampling(rng: random.Random) -> dict[str, Any]:
    fields: dict[str, Any] = {"max_tokens": int(2 ** rng.uniform(0, 7)), "temperature": rng.choice((0, 0.7, 1.0))}
    optional: dict[str, Any] = {
        "n": rng.randint(2, 4),
        "stop": rng.choice(("e", ["\n", "the "], [". ", "!", "?", " he said"])),
        "top_p": 0.9,
        "seed": rng.randrange(2**31),
        "ignore_eos": True,
        "frequency_penalty": 0.5,
    }
    return fields | {name: value for name, value in optional.items() if rng.random() < 0.25}


def make_bad(rng: random.Random) -> Plan:
    """A request no server should accept."""
    good: dict[str, Any] = {"prompt": "Hello", "max_tokens": 4}
    bodies: list[Any] = [
        good | {"n": 0},
        good | {"temperature": -1},
        good | {"no_such_field": 1},
        good | {"max_tokens": "many"},
        good | {"prompt": "word " * 20000},
        good | {"stream_options": {"include_usage": True}},
        {"max_tokens": 4},
        [1, 2, 3],
    ]
    contents = [json.dumps(b).encode() for b in bodies] + [b"{not json", b"", b"\xff\xfe"]
    return Plan("/v1/completions", {"bad": True}, rng.choice(contents), expect_refusal=True)
