"""A request that ends in mid-answer by its own fault, or for want of memory: a 400 or 503, or an event; never a 500."""

from __future__ import annotations

import json
from typing import Any

import pytest

from moe_serve.errors import InvalidRequestError, MoEServeError, OverloadedError

REACHED = InvalidRequestError("guided_regex", "guided_regex: the grammar could not be followed further than 2 tokens")
FULL = OverloadedError("the grammar could not be followed further than 2 tokens: memory is short", retry_after_s=10)
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/responses": {"input": "x"},
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(("error", "status", "param"), [(REACHED, 400, "guided_regex"), (FULL, 503, None)])
def test_whole_answers(make: Any, path: str, error: MoEServeError, status: int, param: str | None) -> None:
    answer = make(breaks_after=(2, error)).talk((path, BODIES[path]))[0]
    assert answer.status_code == status
    assert answer.json()["error"]["param"] == param
    assert answer.json()["error"]["message"] == error.message


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_streams(make: Any, path: str) -> None:
    answer = make(breaks_after=(2, REACHED)).talk((path, {**BODIES[path], "stream": True}))[0]
    assert answer.status_code == 200
    *_, failed, done = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert json.loads(failed)["error"] == {
        "message": REACHED.message,
        "type": "invalid_request_error",
        "param": "guided_regex",
        "code": 400,
    }
    assert done == "[DONE]"


def test_a_stream_that_has_shown_nothing_yet_is_refused(make: Any) -> None:
    answer = make(breaks_after=(0, REACHED)).talk(("/v1/completions", {"prompt": "x", "stream": True}))[0]
    assert answer.status_code == 400


def test_a_stream_of_responses(make: Any) -> None:
    answer = make(breaks_after=(2, REACHED)).talk(("/v1/responses", {"input": "x", "stream": True}))[0]
    *_, last = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
    assert last["type"] == "response.failed"
    assert last["response"]["error"]["message"] == REACHED.message
