"""What Claude Code and the Codex CLI send in an ordinary turn, replayed to the demo model: no answer is a 4xx.

Each file of `recorded/` holds the requests of one turn that calls one tool, as the client sent them to a server that
wrote them down. Texts are shortened, ids are zero, and three or four of the tools are left, one of each shape. Only the
answer's length is added.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.patience import PATIENCE_S

RECORDED = Path(__file__).parent / "recorded"
PLACES = [
    pytest.param(name, turn, id=f"{name}-{turn}")
    for name in ("claude_code", "codex")
    for turn in range(len(json.loads((RECORDED / f"{name}.json").read_text())["turns"]))
]
LENGTH = {"claude_code": {"max_tokens": 8}, "codex": {"max_output_tokens": 8}}
LAST = {"claude_code": ("message_stop",), "codex": ("response.completed", "response.incomplete")}


def events_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


@pytest.mark.parametrize(("name", "turn"), PLACES)
def test_a_turn_is_answered_to_its_end(demo_url: str, name: str, turn: int) -> None:
    recorded = json.loads((RECORDED / f"{name}.json").read_text())
    body = {**recorded["turns"][turn], "tools": recorded["tools"], "model": "gpt-5.2", **LENGTH[name]}
    answer = httpx.post(f"{demo_url}{recorded['path']}", json=body, headers=recorded["headers"], timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    events = events_of(answer.text)
    assert events[-1]["type"] in LAST[name]
    assert any("delta" in event for event in events)


def test_the_answer_to_a_question_about_the_server_is_no_error(demo_url: str) -> None:
    """Claude Code asks for the address alone before its first turn."""
    assert httpx.head(demo_url).status_code == 200
    assert httpx.head(f"{demo_url}/").status_code == 200
