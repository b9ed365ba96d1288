"""Clients that send, or take, next to nothing: real sockets against a real uvicorn with our connection class."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import pytest
import uvicorn

from moe_serve.server.transport.connections import connection_class
from tests.patience import PATIENCE_S

READ_S, WRITE_S, KEEP_ALIVE_S, LIMIT = 0.5, 1.0, 1, 8
SLACK_S = PATIENCE_S / 2
"""How late a limit may act on a busy machine. Without the limit nothing would happen within PATIENCE_S."""
CHUNK = b"x" * 65536
MEDIUM_BYTES = 60_000
"""Below the 64 KiB from which on a connection counts as stalled, above what small socket buffers hold."""
POST = b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"


class Firehose:
    """An application that answers without end and notes what became of it."""

    def __init__(self) -> None:
        self.sent_bytes = 0
        self.ended = threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            if scope["path"] != "/":
                body = {"/small": b"ok", "/medium": CHUNK[:MEDIUM_BYTES]}[scope["path"]]
                await send({"type": "http.response.body", "body": body})
                return
            leaving = asyncio.create_task(self._until_left(receive))
            while not leaving.done():
                await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
                self.sent_bytes += len(CHUNK)
                await asyncio.sleep(0)  # send itself does not yield while the client keeps up
        finally:
            if scope["path"] == "/":
                self.ended.set()

    async def _until_left(self, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass


@contextmanager
def serving(app: Any, small_buffers: bool = False) -> Iterator[tuple[str, int]]:
    settings: dict[str, Any] = {"http": connection_class(READ_S, WRITE_S, LIMIT), "ws": "none", "lifespan": "off"}
    settings |= {"timeout_keep_alive": KEEP_ALIVE_S} if small_buffers else {}
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1, **settings))
    with socket.socket() as listener:
        if small_buffers:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        address = listener.getsockname()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.005)
            yield address
        finally:
            server.should_exit = True
            thread.join()


def seconds_until_closed(sock: socket.socket) -> float:
    """Read until the server ends the connection."""
    start = time.monotonic()
    sock.settimeout(PATIENCE_S)
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return time.monotonic() - start


def take(sock: socket.socket, slow_s: float) -> int:
    """Bytes of an answer that came: one now and then for `slow_s`, then what there is until the end."""
    stop, taken = time.monotonic() + slow_s, 0
    with suppress(ConnectionResetError):
        while time.monotonic() < stop:
            taken += len(sock.recv(1))
            time.sleep(0.02)
        while data := sock.recv(65536):
            taken += len(data)
    return taken


def read_answer(sock: socket.socket) -> bytes:
    """One chunked answer; it may come in several pieces."""
    answer = b""
    while not answer.endswith(b"0\r\n\r\n"):
        answer += sock.recv(4096)
    return answer


def drip(sock: socket.socket, data: bytes) -> None:
    for byte in data:
        sock.sendall(bytes([byte]))
        time.sleep(0.02)


def until(condition: Callable[[], object]) -> None:
    """Wait for two hundred clients, on a machine that may be busy."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


@pytest.mark.parametrize("beginning", [b"", b"G", b"GET / HTTP/1.1\r\nHost: h\r\nX-Slow: "])
def test_headers_that_do_not_end_end_the_connection(beginning: bytes) -> None:
    with serving(Firehose()) as address, socket.create_connection(address) as sock:
        sock.sendall(beginning)
        assert READ_S * 0.8 < seconds_until_closed(sock) < READ_S + SLACK_S


def test_a_header_byte_now_and_then_does_not_help() -> None:
    with serving(Firehose()) as address, socket.create_connection(address) as sock:
        start = time.monotonic()
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            drip(sock, b"GET / HTTP/1.1\r\nX: " + b"y" * 1000)
        assert time.monotonic() - start < READ_S + SLACK_S


def test_a_second_request_has_the_same_time_for_its_headers() -> None:
    with serving(Firehose()) as address, socket.create_connection(address) as sock:
        for _ in range(2):
            sock.sendall(b"GET /small HTTP/1.1\r\nHost: h\r\n\r\n")
            assert read_answer(sock).startswith(b"HTTP/1.1 200")
            time.sleep(READ_S * 2)  # idle between requests is no fault
        sock.sendall(b"GET /small HT")
        assert READ_S * 0.8 < seconds_until_closed(sock) < READ_S + SLACK_S


def test_who_takes_nothing_is_cut_off_and_costs_little_memory() -> None:
    app = Firehose()
    with serving(app) as address, socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(address)
        sock.sendall(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        stop = time.monotonic() + WRITE_S + SLACK_S
        sock.settimeout(PATIENCE_S)
        while not app.ended.is_set() and time.monotonic() < stop:
            sock.recv(1)
            time.sleep(0.05)
        assert app.ended.is_set()
        assert app.sent_bytes < 16 << 20


@pytest.mark.parametrize("ending", ["Connection: close", "Connection: keep-alive"])
def test_a_whole_answer_taken_byte_by_byte_does_not_keep_the_connection(ending: str) -> None:
    """The application has long finished; what is left lies in the server's buffer."""
    with serving(Firehose(), small_buffers=True) as address, socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(address)
        sock.settimeout(PATIENCE_S)
        sock.sendall(f"GET /medium HTTP/1.1\r\nHost: h\r\n{ending}\r\n\r\n".encode())
        assert take(sock, KEEP_ALIVE_S + WRITE_S + 0.5) < MEDIUM_BYTES


def test_who_reads_on_is_not() -> None:
    app = Firehose()
    with serving(app) as address, socket.create_connection(address) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        stop = time.monotonic() + WRITE_S * 3
        while time.monotonic() < stop:
            assert sock.recv(1 << 20)
        assert not app.ended.is_set()


def test_others_are_served_meanwhile() -> None:
    with serving(Firehose()) as (host, port), socket.create_connection((host, port)) as slow:
        slow.sendall(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        time.sleep(0.1)
        assert httpx.get(f"http://{host}:{port}/small", timeout=PATIENCE_S).text == "ok"


def test_connections_beyond_the_limit_are_told_so() -> None:
    with serving(Firehose()) as address:
        held = [socket.create_connection(address) for _ in range(LIMIT)]
        time.sleep(0.05)
        with socket.create_connection(address) as extra:
            extra.settimeout(PATIENCE_S)
            answer = extra.recv(4096)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"Retry-After" in answer
        head, _, body = answer.partition(b"\r\n\r\n")
        assert f"Content-Length: {len(body)}".encode() in head
        for sock in held:
            sock.close()
        time.sleep(0.05)
        with socket.create_connection(address) as again:
            again.sendall(b"GET /small HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
            again.settimeout(PATIENCE_S)
            assert again.recv(4096).startswith(b"HTTP/1.1 200")


def test_two_hundred_who_leave_at_once_leave_nothing_behind(make: Any) -> None:
    served = make(delay_s=0.002)
    body = b'{"prompt": "x", "max_tokens": 400, "stream": true}'
    request = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body

    class Served:
        """The application with its lifespan, under our connection class without a limit."""

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await served.app(scope, receive, send)

    server = uvicorn.Server(
        uvicorn.Config(Served(), http=connection_class(5, 5, 1000), ws="none", log_level="critical")
    )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        until(lambda: server.started)
        address = listener.getsockname()
        for _ in range(2):
            clients = [socket.create_connection(address) for _ in range(100)]
            for sock in clients:
                sock.sendall(request)
            until(lambda: served.async_engine.num_in_flight >= 50)
            for sock in clients:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # reset, not close
                sock.close()
            until(lambda: served.async_engine.num_in_flight == 0 and not served.engine.has_work())
        assert httpx.get(f"http://{address[0]}:{address[1]}/health").json() == {"status": "ready"}
        server.should_exit = True
        thread.join()
