"""Clients that do not read, and clients that close their sending side, over real sockets and our connection class."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn

from moe_serve.server.transport.connections import connection_class
from tests.patience import PATIENCE_S

TOKENS = 6000
"""A stream of 1 MB: more than sockets, uvicorn and the unread outputs of a request take together."""


def wait_until(condition: Any) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@contextmanager
def listening(served: Any) -> Iterator[tuple[str, int]]:
    server = uvicorn.Server(
        uvicorn.Config(served.app, http=connection_class(60, 60, 100), ws="none", log_level="critical")
    )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        wait_until(lambda: server.started)
        try:
            yield listener.getsockname()
        finally:
            server.should_exit = True
            thread.join()


def ask(address: tuple[str, int], body: dict[str, Any], is_half_closed: bool = False) -> socket.socket:
    """Send a request; half closed, its last byte comes with the end of what the client sends."""
    content = json.dumps(body).encode()
    sock = socket.socket()
    sock.settimeout(PATIENCE_S)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
    sock.connect(address)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Type: application/json\r\n"
    sock.sendall(head + b"Content-Length: %d\r\n\r\n%b" % (len(content), content[:-1]))
    if is_half_closed:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    sock.sendall(content[-1:])
    if is_half_closed:
        sock.shutdown(socket.SHUT_WR)
    return sock


def heard(sock: socket.socket) -> bytes:
    pieces = []
    while piece := sock.recv(1 << 16):
        pieces.append(piece)
    return b"".join(pieces)


def test_nothing_is_computed_for_a_client_that_does_not_read(make: Any) -> None:
    served = make(max_model_len=2 * TOKENS)
    with listening(served) as address:
        slow = ask(address, {"prompt": "x", "max_tokens": TOKENS, "stream": True, "return_token_ids": True})
        with slow:
            wait_until(lambda: served.engine.paused)
            (sample,) = served.engine.running
            before = sample.generated
            with ask(address, {"prompt": "x", "max_tokens": 3}) as other:
                assert heard(other).startswith(b"HTTP/1.1 200")
            assert sample.generated == before < TOKENS
            answer = heard(slow)
    assert not served.engine.paused
    assert answer.count(b"data: {") == TOKENS
    assert b"data: [DONE]" in answer


@pytest.mark.parametrize(("is_half_closed", "client"), [(False, "127.0.0.1"), (True, "127.0.0.1, half closed")])
def test_half_closed_connections_of_an_address_are_a_client_of_their_own(
    make: Any, is_half_closed: bool, client: str
) -> None:
    served = make()
    served.engine.gate.clear()
    with listening(served) as address, ask(address, {"prompt": "x", "max_tokens": 3}, is_half_closed) as sock:
        wait_until(lambda: served.engine.waiting)
        assert [s.request.client for s in served.engine.waiting] == [client]
        served.engine.gate.set()
        assert b" 200 OK" in heard(sock)
