"""Requests sent ahead, clients that close their sending side, and clients that leave: answers come, or work ends."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn

from moe_serve.server.transport import exchanges
from moe_serve.server.transport.connections import connection_class
from tests.patience import PATIENCE_S

HOST = b"Host: h\r\n"
POST = b"POST /echo HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\n\r\nhello"


class Slow:
    """Answers /echo with the body, /N after a second, /stream with ten pieces, and notes who left."""

    def __init__(self) -> None:
        self.left = threading.Event()
        self.paths: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.paths.append(scope["path"])
        body = (await receive()).get("body", b"")
        if scope["path"] == "/slow":
            if await self._leaves(receive, 1.0 if scope["http_version"] == "1.0" else 4.0):
                return
            body = b"slow"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        for at in range(len(body)):
            await send({"type": "http.response.body", "body": body[at : at + 1], "more_body": True})
        await send({"type": "http.response.body"})

    async def _leaves(self, receive: Any, within_s: float) -> bool:
        try:
            async with asyncio.timeout(within_s):
                while (await receive())["type"] != "http.disconnect":
                    pass
        except TimeoutError:
            return False
        self.left.set()
        return True


@contextmanager
def serving(app: Any) -> Iterator[tuple[str, int]]:
    server = uvicorn.Server(
        uvicorn.Config(
            app, log_level="error", log_config=None, http=connection_class(20, 20, 64), ws="none", lifespan="off"
        )
    )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.005)
            yield listener.getsockname()
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def app() -> Slow:
    return Slow()


@pytest.fixture
def address(app: Slow) -> Iterator[tuple[str, int]]:
    with serving(app) as address:
        yield address


def talk(address: tuple[str, int], data: bytes, *, closes: bool) -> bytes:
    """Everything that the server says until it closes, after `data` and, if `closes`, the end of sending."""
    with socket.create_connection(address, PATIENCE_S) as sock:
        sock.sendall(data)
        if closes:
            sock.shutdown(socket.SHUT_WR)
        heard = b""
        while piece := sock.recv(65536):
            heard += piece
    return heard


def test_a_half_closed_client_gets_its_answer(address: tuple[str, int]) -> None:
    heard = talk(address, POST, closes=True)
    assert heard.startswith(b"HTTP/1.1 200")
    assert heard.endswith(b"hello")


def test_it_gets_one_that_takes_long(address: tuple[str, int]) -> None:
    heard = talk(address, b"GET /slow HTTP/1.1\r\n" + HOST + b"\r\n", closes=True)
    assert heard.endswith(b"slow")
    *interim, answer = heard.split(b"HTTP/1.1 ")[1:]
    assert answer.startswith(b"200")
    assert all(part == b"100 Continue\r\n\r\n" for part in interim)


def test_http_1_0_gets_no_interim_answer(address: tuple[str, int]) -> None:
    heard = talk(address, b"GET /slow HTTP/1.0\r\n\r\n", closes=True)
    assert heard.startswith(b"HTTP/1.1 200")
    assert heard.endswith(b"slow")


def test_all_that_was_sent_ahead_is_answered(address: tuple[str, int]) -> None:
    assert talk(address, 3 * POST, closes=True).count(b"hello") == 3


def test_half_a_request_ends_the_connection(address: tuple[str, int]) -> None:
    assert talk(address, POST.removesuffix(b"hello"), closes=True) == b""
    assert talk(address, b"GET / HT", closes=True) == b""


@pytest.mark.parametrize("ahead", [b"", POST])
def test_a_client_that_has_left_is_noticed(app: Slow, address: tuple[str, int], ahead: bytes) -> None:
    with socket.create_connection(address) as sock:
        sock.sendall(b"GET /slow HTTP/1.1\r\n" + HOST + b"\r\n" + ahead)
        time.sleep(0.2)
    assert app.left.wait(sum(exchanges.PROBES_S) + PATIENCE_S)
    time.sleep(0.1)
    assert app.paths == ["/slow"], "what was sent ahead is not begun"


def test_many_requests_sent_ahead_are_parsed_a_few_at_a_time(
    address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting: list[int] = []

    start = exchanges.Exchanges._start_asgi_task

    def watched(connection: exchanges.Exchanges, cycle: Any, app: Any) -> None:
        waiting.append(len(connection.pipeline))
        start(connection, cycle, app)

    monkeypatch.setattr(exchanges.Exchanges, "_start_asgi_task", watched)
    small = b"GET /x HTTP/1.1\r\n" + HOST + b"\r\n"
    count = 4 * exchanges.PIECE_BYTES // len(small)
    assert talk(address, count * small, closes=True).count(b"HTTP/1.1 200") == count
    assert len(waiting) == count
    assert max(waiting) <= 2 * exchanges.PIECE_BYTES // len(small)


def test_what_came_before_the_bytes_that_are_no_http_is_answered_first(address: tuple[str, int]) -> None:
    heard = talk(address, POST + POST + b"\x00\x01\r\n\r\n", closes=False)
    assert heard.count(b"hello") == 2
    assert heard.index(b"HTTP/1.1 400") > heard.rindex(b"hello")


CHUNKED = b"POST /echo HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n"
BAD_CHUNK = b"\r\n5\r\nhello\r\nzz\r\n"


@pytest.mark.parametrize("expects", [b"", b"Expect: 100-continue\r\n"])
@pytest.mark.parametrize("before", [b"", POST])
def test_a_request_whose_body_is_no_http_ends(before: bytes, expects: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with serving(Slow()) as address:
        heard = talk(address, before + CHUNKED + expects + BAD_CHUNK, closes=False)
    assert heard.count(b"hello") == bool(before)
    assert heard.count(b"HTTP/1.1 400") == 1
    assert "Traceback" not in caplog.text
