"""Bodies that cost much, sent to `moe-serve serve` as a process of its own: refused, while probes are answered."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.patience import PATIENCE_S, on_a_quiet_moment
from tests.server.serve_process import Serve

LATE_S = 1.0
"""A probe answered this late stood behind a body: on an idle machine they take 5 to 60 ms."""
MILLION = 10**6
HELLO = b"hello " * (4 * MILLION)
NULLS = dict.fromkeys(map(str, range(200_000)))
BODIES: dict[str, tuple[str, bytes]] = {
    "words": ("/v1/completions", b'{"prompt":"' + b"hello world " * (2 * MILLION) + b'"}'),
    "one letter": ("/v1/completions", b'{"prompt":"' + b"a" * (30 * MILLION) + b'"}'),
    "several texts": ("/v1/completions", json.dumps({"prompt": ["hello " * 40_000] * 100}).encode()),
    "empty lists": ("/v1/completions", b'{"prompt":[' + b"[]," * (9 * MILLION) + b"[]]}"),
    "numbers": ("/v1/completions", b'{"prompt":[' + b"1," * (14 * MILLION) + b"1]}"),
    "wrong elements": ("/v1/completions", b'{"prompt":[' + b"null," * 450_000 + b"null]}"),
    "wrong values": (
        "/v1/completions",
        json.dumps({"prompt": "a", "logit_bias": NULLS}).encode(),
    ),
    "unknown fields": ("/v1/completions", json.dumps(NULLS).encode()),
    "a long name": ("/v1/completions", json.dumps({"x" * (20 * MILLION): 1}).encode()),
    "escapes": ("/v1/completions", b'{"prompt":"' + b"\\n" * (14 * MILLION) + b'"}'),
    "bad words": ("/v1/completions", json.dumps({"prompt": "a", "bad_words": ["hello " * 5000] * 900}).encode()),
    "a message": (
        "/v1/chat/completions",
        b'{"messages":[{"role":"user","content":"' + HELLO + b'"}]}',
    ),
    "messages": ("/v1/chat/completions", json.dumps({"messages": [{"role": "user"}] * 200_000}).encode()),
    "an input": ("/v1/responses", b'{"input":"' + HELLO + b'"}'),
    "tokenize": ("/tokenize", b'{"prompt":"' + b"hello world " * (2 * MILLION) + b'"}'),
    "detokenize": ("/detokenize", b'{"tokens":[' + b"5," * (10 * MILLION) + b"5]}"),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    serve = Serve(tmp_path_factory.mktemp("heavy"))
    serve.wait_until(lambda: serve.health() == "ready")
    yield serve
    serve.process.kill()
    serve.process.wait()


def resident_mib(server: Serve) -> float:
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def ask(server: Serve, path: str, body: bytes) -> httpx.Response:
    headers = {"Content-Type": "application/json"}
    return httpx.post(server.url + path, content=body, headers=headers, timeout=PATIENCE_S)


def slowest_probe(server: Serve, path: str, body: bytes) -> tuple[float, httpx.Response]:
    """How long /live took at most while a body was dealt with, and the answer to that."""
    found: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: found.append(ask(server, path, body)))
    asking.start()
    slowest = 0.0
    with httpx.Client(timeout=PATIENCE_S) as client:
        while asking.is_alive():
            start = time.monotonic()
            assert client.get(f"{server.url}/live").status_code == 200
            slowest = max(slowest, time.monotonic() - start)
            time.sleep(0.01)
    asking.join()
    return slowest, found[0]


@pytest.mark.parametrize("name", BODIES)
def test_a_heavy_body_is_refused_and_holds_no_probe_up(server: Serve, name: str) -> None:
    def check() -> None:
        waited_s, response = slowest_probe(server, *BODIES[name])
        assert response.status_code == 400, response.text[:300]
        assert len(response.text) < 1000
        assert waited_s < LATE_S

    on_a_quiet_moment(check)


def test_memory_comes_back(server: Serve) -> None:
    ask(server, *BODIES["words"])
    before = resident_mib(server)
    for name in ("words", "empty lists", "numbers", "a message"):
        ask(server, *BODIES[name])
    deadline = time.monotonic() + 30
    while resident_mib(server) > before + 50 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert resident_mib(server) < before + 50


def post(served: Any, path: str, body: bytes, **headers: str) -> tuple[int, str]:
    from fastapi.testclient import TestClient

    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    response = TestClient(served.app).post(path, content=body, headers=sent)
    return response.status_code, response.json().get("error", {}).get("message", "")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Content_Type": "application/json"}, 200),
        ({"Content_Type": "Application/JSON; charset=UTF-8"}, 200),
        ({"Content_Type": "text/plain"}, 415),
        ({"Content_Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content_Type": "application/json; charset=utf-16"}, 415),
        ({"Content_Type": "application/json", "Content_Encoding": "gzip"}, 415),
    ],
)
def test_headers_that_describe_the_body_are_obeyed_or_refused(
    served: Any, headers: dict[str, str], status: int
) -> None:
    got, message = post(served, "/tokenize", b'{"prompt":"a"}', **headers)
    assert got == status, message


def test_a_byte_order_mark_is_no_fault(served: Any) -> None:
    assert post(served, "/tokenize", b'\xef\xbb\xbf{"prompt":"a"}')[0] == 200
