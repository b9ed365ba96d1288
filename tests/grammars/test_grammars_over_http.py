"""Hostile grammars over HTTP: a 400 that names the field, or an answer; the server and the others go on."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from moe_serve.scheduling.sequence import GrammarKind
from tests.fuzz.harness import random_app, served
from tests.grammars.hostile import FOLLOWED, LIMITED, REFUSED, slow_gbnf


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(random_app()) as url:
        yield url


def complete(url: str, **more: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 4, **more}, timeout=90)


def field_of(kind: GrammarKind, text: str) -> dict[str, Any]:
    """A request's field for a grammar, and where a schema can go as text it does."""
    if kind is GrammarKind.JSON_SCHEMA:
        return {"guided_json": text}
    return {"guided_regex": text} if kind is GrammarKind.REGEX else {"guided_grammar": text}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_field(url: str, name: str) -> None:
    fields = field_of(REFUSED[name].kind, REFUSED[name].text)
    answer = complete(url, **fields)
    assert answer.status_code == 400, answer.text[:500]
    assert answer.json()["error"]["param"] == next(iter(fields))
    assert complete(url).status_code == 200


@pytest.mark.parametrize("name", ["8000 rules, each the next", "5000 references to nullable lists"])
def test_what_is_large_is_answered_or_refused(url: str, name: str) -> None:
    assert complete(url, **field_of(LIMITED[name].kind, LIMITED[name].text)).status_code in (200, 400)
    assert complete(url).status_code == 200


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_schema_that_can_be_followed_is_answered(url: str, name: str) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": FOLLOWED[name][0]}}
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "response_format": schema}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text


def test_the_longest_choice_that_is_allowed_works(url: str) -> None:
    answer = complete(url, guided_choice=[f"c{i}" * 50 for i in range(10_000)])
    assert answer.status_code == 200, answer.text[:500]
    assert answer.json()["choices"][0]["text"].startswith("c")
    refused = complete(url, guided_choice=["a"] * 10_001)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "guided_choice"


def test_clients_that_leave_take_their_grammars_along_and_hold_up_nobody(url: str) -> None:
    def ask(number: int) -> None:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{url}/v1/completions",
                json={"prompt": "x", "max_tokens": 2, "guided_grammar": slow_gbnf(number).text},
                timeout=httpx.Timeout(60, read=2),
            )

    hostile = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in hostile:
        thread.start()
    time.sleep(1)
    start = time.monotonic()
    assert httpx.get(f"{url}/live", timeout=30).status_code == 200
    assert complete(url, guided_regex="[a-z]+").status_code == 200
    assert time.monotonic() - start < 15, "8 of them alone take more than 80 s"
    for thread in hostile:
        thread.join()
    start = time.monotonic()
    assert complete(url, guided_json=json.dumps({"type": "integer", "minimum": 7})).status_code == 200
    assert time.monotonic() - start < 8, "nothing of theirs is left"
