"""Answers with very many log-probabilities: shaped on a thread, while /live is answered to another process."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_serve.server import preparation
from moe_serve.server.endpoints.answers.json_pieces import MOST_ITEMS, dumped
from moe_serve.server.endpoints.chat import ChatShapes
from moe_serve.server.endpoints.completions import CompletionShapes
from moe_serve.server.endpoints.responses import ResponseShape
from tests.patience import on_a_quiet_moment
from tests.server.serve_process import serving
from tests.server.test_heavy_bodies import LATE_S, slowest_probe

PLAIN = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
JSON = st.recursive(PLAIN | TEXT, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=30)


@given(JSON)
def test_pieces_are_the_whole(value: Any) -> None:
    assert dumped(value) == orjson.dumps(value)


@pytest.mark.parametrize("length", [0, 1, MOST_ITEMS, MOST_ITEMS + 1, 3 * MOST_ITEMS])
def test_long_lists_are_the_whole(length: int) -> None:
    choices = [{"index": i, "logprobs": {"top": [{"a": i}] * length, "no": [None] * length}} for i in range(2)]
    assert dumped({"choices": choices}) == orjson.dumps({"choices": choices})


THREAD = "moe-serve-prepare"
CHAT = {"max_tokens": 4, "logprobs": True, "top_logprobs": 3}
ASKS: dict[str, tuple[type, str, str, dict[str, Any]]] = {
    "completions": (CompletionShapes, "whole", "/v1/completions", {"prompt": "x", "logprobs": 3}),
    "completions, in chunks": (CompletionShapes, "chunk", "/v1/completions", {"prompt": "x", "logprobs": 3}),
    "chat": (ChatShapes, "whole", "/v1/chat/completions", {"max_tokens": 4, "logprobs": True, "top_logprobs": 3}),
    "chat, in chunks": (
        ChatShapes,
        "chunk",
        "/v1/chat/completions",
        {"max_tokens": 4, "logprobs": True, "top_logprobs": 3},
    ),
    "responses": (
        ResponseShape,
        "whole",
        "/v1/responses",
        {"input": "x", "max_output_tokens": 16, "include": ["message.output_text.logprobs"], "top_logprobs": 3},
    ),
}


@pytest.mark.parametrize("name", ASKS)
@pytest.mark.parametrize("is_large", [True, False])
def test_large_answers_are_shaped_on_a_thread(
    name: str, is_large: bool, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, method, path, body = ASKS[name]
    threads: list[str] = []
    shape = getattr(shapes, method)

    def spy(*args: Any) -> Any:
        threads.append(threading.current_thread().name)
        return shape(*args)

    if is_large:
        monkeypatch.setattr(preparation, "INLINE_SCORES", 0)
    wanted = make().post(path, **messages_for(path), **body)
    monkeypatch.setattr(shapes, method, spy)
    served = make()
    if method == "chunk":
        assert served.stream(path, **messages_for(path), **body)
    else:
        assert served.post(path, **messages_for(path), **body).keys() == wanted.keys()
    assert threads
    assert all(thread.startswith(THREAD) is is_large for thread in threads)


def messages_for(path: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {}


@pytest.mark.slow
def test_a_large_answer_holds_no_probe_up(tmp_path: Path) -> None:
    """Without the thread this one takes the event loop for 2 s."""
    body = {"prompt": "Once", "max_tokens": 1000, "ignore_eos": True, "n": 32, "logprobs": 20}

    def check() -> None:
        waited_s, answer = slowest_probe(server, "/v1/completions", json.dumps(body).encode())
        assert len(answer.json()["choices"]) == 32
        assert waited_s < LATE_S

    with serving(tmp_path) as start:
        server = start()
        server.wait_until(lambda: server.health() == "ready")
        on_a_quiet_moment(check)
