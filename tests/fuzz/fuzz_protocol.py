"""Fuzz the request parser: any bytes become a request, or an error that names a field. Never anything else.

    python tests/fuzz/fuzz_protocol.py --minutes 10

Bodies are random bytes, damaged good bodies, and objects of known fields with likely and unlikely values.
What parses goes on through chat templates, tools and grammars up to the engine's own check.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2]))
from moe_serve.errors import InvalidRequestError
from moe_serve.scheduling.sequence import Request
from moe_serve.server.endpoints import chat, completions
from moe_serve.server.endpoints.bodies import prompts
from moe_serve.server.endpoints.bodies.parsing import Body, parse
from moe_serve.server.endpoints.chat import ChatBody
from moe_serve.server.endpoints.completions import CompletionBody
from moe_serve.server.endpoints.tokenize import DetokenizeBody, TokenizeBody
from moe_serve.server.service import Service
from moe_serve.server.transport.http_errors import error_body
from tests.fuzz.harness import fuzz_for_minutes, random_app

MESSAGE = {"role": "user", "content": "Hello"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
GOOD: dict[type[Body], dict[str, Any]] = {
    CompletionBody: {"prompt": "Hello", "max_tokens": 4},
    ChatBody: {"messages": [MESSAGE], "max_tokens": 4},
    TokenizeBody: {"prompt": "Hello"},
    DetokenizeBody: {"tokens": [5, 6]},
}
LIKELY = [
    *(None, True, False, 0, 1, -1, 2, 0.5, 2**31, 2**63, 2**64, 1e308, "", "a", "auto", "none", "required", [], {}),
    *([""], ["a"], [5], [[5]], [MESSAGE], [TOOL], {"5": 1}, {"type": "json_object"}, SCHEMA, {"regex": "a+"}),
    *({"choice": ["a", "b"]}, {"json": "{"}, "start: /a+/", 'root ::= "a"', "(a", {"include_usage": True}),
    {"type": "function", "function": {"name": "f"}},
    [{"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]}],
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


Properties = dict[str, Callable[[int, int], int]]
"""Name -> what fuzzes it; see harness.fuzz_for_minutes."""


def bodies(body_class: type[Body]) -> st.SearchStrategy[bytes]:
    good = GOOD[body_class]
    fields = [*body_class.model_fields, *body_class.unsupported, "unknown"]
    values = st.sampled_from(LIKELY) | JSON
    changes = st.dictionaries(st.sampled_from(fields), values, max_size=4)
    objects = changes.map(lambda c: json.dumps({**good, **c}).encode())
    damaged = st.builds(_damaged, objects, st.integers(0, 200), st.binary(max_size=4))
    return st.binary(max_size=60) | objects | objects | objects | damaged


def _damaged(raw: bytes, place: int, junk: bytes) -> bytes:
    place %= len(raw)
    return raw[:place] + junk + raw[place + 1 :]


class Handler:
    """What happens to a body between the socket and the engine."""

    def __init__(self) -> None:
        self.service: Service = random_app().state.service

    def handle(self, body_class: type[Body], raw: bytes) -> None:
        body = parse(raw, body_class)
        for request in self._requests(body):
            self.service.engine.core.check_request(request)

    def _requests(self, body: Body) -> list[Request]:
        if isinstance(body, CompletionBody):
            return completions.requests_of(body, "r", self.service)
        if isinstance(body, ChatBody):
            plan = chat.plan(body, "r", self.service)
            plan.new_parser().feed("some [text] <tool_call>{", True)
            return [plan.request]
        if isinstance(body, TokenizeBody) and body.messages is not None:
            prompts.render(body, body.messages, [t.model_dump() for t in body.tools or ()], self.service.tokenizer)
        return []


def run(handler: Handler, body_class: type[Body], seed: int, examples: int) -> int:
    count = 0

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(raw=bodies(body_class))
    def example(raw: bytes) -> None:
        nonlocal count
        count += 1
        try:
            handler.handle(body_class, raw)
        except InvalidRequestError as error:
            _check_answer(error_body(error)["error"])

    example()
    return count


def _check_answer(error: dict[str, Any]) -> None:
    assert error["param"]
    assert error["code"] == 400
    json.dumps(error, ensure_ascii=False).encode()


def properties() -> Properties:
    handler = Handler()
    return {c.__name__: lambda seed, n, c=c: run(handler, c, seed, n) for c in GOOD}  # type: ignore[misc]


if __name__ == "__main__":
    fuzz_for_minutes(properties())
