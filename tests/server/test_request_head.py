"""Heads of requests that are too large, too many or none: refused before anything is done with them."""

from __future__ import annotations

import asyncio
import errno
import json
import resource
import socket
import threading
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from moe_serve.server.transport.connections import connection_class
from tests.patience import PATIENCE_S
from tests.server.test_connections import Firehose, serving

GET = b"GET /small HTTP/1.1\r\nHost: h\r\n"


async def body_reader(scope: Any, receive: Any, send: Any) -> None:
    """An application that answers once it has the whole body."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


def answer_to(*pieces: bytes) -> tuple[int, dict[str, object]]:
    """Status and error of the answer to what is sent, in these pieces, until the server hangs up."""
    with serving(body_reader) as address, socket.create_connection(address, timeout=PATIENCE_S) as sock:
        try:
            for piece in pieces:
                sock.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass
        answer = b""
        while data := sock.recv(65536):
            answer += data
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"Connection: close" in head
    return int(head.split()[1]), json.loads(body)["error"]


class GoneClient(asyncio.Transport):
    """A transport whose client has reset the connection, which asyncio has not noticed."""

    def __init__(self) -> None:
        super().__init__()
        self.is_closed = threading.Event()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        pass

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    def is_closing(self) -> bool:
        return self.is_closed.is_set()

    def close(self) -> None:
        self.is_closed.set()


def test_a_refusal_to_a_client_that_has_gone_is_no_error() -> None:
    """Found by tests/fuzz/fuzz_http.py: an unknown method, then bytes that are no HTTP, then a reset."""

    async def run() -> None:
        config = uvicorn.Config(body_reader, lifespan="off", log_config=None)
        config.load()
        make: Any = connection_class(5, 5, 10)
        connection = make(config=config, server_state=ServerState(), app_state={})
        transport = GoneClient()
        connection.connection_made(transport)
        connection.data_received(b"no HTTP\r\n\r\n")
        while not transport.is_closing():
            await asyncio.sleep(0.05)
        connection.connection_lost(None)

    asyncio.run(asyncio.wait_for(run(), PATIENCE_S))


LINES = b"".join(b"h%d: x\r\n" % i for i in range(2000))
TOO_LARGE = {
    "many lines": [GET, *[LINES] * 200, b"\r\n"],
    "a few too many lines": [GET, b"".join(b"h%d: x\r\n" % i for i in range(101)), b"\r\n"],
    "one long line": [GET, b"A: " + b"a" * (1 << 20), b"\r\n\r\n"],
    "a line without an end": [GET, b"A: ", *[b"a" * 65536] * 100],
    "large lines": [GET, *[b"B: " + b"b" * 8000 + b"\r\n"] * 9, b"\r\n"],
    "a long path": [b"GET /" + b"p" * (1 << 17) + b" HTTP/1.1\r\nHost: h\r\n\r\n"],
    "trailers without an end": [
        b"POST /small HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nT: ",
        *[b"t" * 65536] * 20,
    ],
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_a_head_that_is_too_large_is_431(name: str) -> None:
    status, error = answer_to(*TOO_LARGE[name])
    assert status == 431
    assert error["code"] == 431


def test_refused_heads_leave_no_memory_behind() -> None:
    with serving(Firehose()) as address:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with socket.create_connection(address, timeout=PATIENCE_S) as sock:
            try:
                sock.sendall(GET)
                for _ in range(1000):
                    sock.sendall(LINES)
            except (BrokenPipeError, ConnectionResetError):
                pass
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10  # KiB


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /small HTTP/1.1\r\n\r\n", 400),
        (GET + b"Host: i\r\n\r\n", 400),
        (b"GET /small HTTP/1.1\r\nHost h\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01", 400),
        (b"GET /small\r\n\r\n", 505),
    ],
)
def test_what_is_no_request_is_refused_in_the_shape_of_all_errors(head: bytes, status: int) -> None:
    got, error = answer_to(head)
    assert got == status
    assert error["type"] == "invalid_request_error"


def test_an_old_client_needs_no_host() -> None:
    with serving(Firehose()) as address, socket.create_connection(address, timeout=PATIENCE_S) as sock:
        sock.sendall(b"GET /small HTTP/1.0\r\n\r\n")
        assert b" 200 " in sock.recv(4096)
