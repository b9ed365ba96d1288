"""Nothing that a stranger sends ends a door, holds it up or takes its memory. Real sockets, no processes."""

from __future__ import annotations

import contextlib
import resource
import socket
import struct
import time
from collections.abc import Iterator

import pytest

from moe_serve.parallel.front.gathering import next_link
from moe_serve.parallel.wire import door
from moe_serve.parallel.wire.door import HELLO, MAX_CALLERS, WORD_BYTES, Door, knock, word_of

WORD = b"0123456789abcdef" * 2
ONE_GIB = 1 << 30


@pytest.fixture
def opened() -> Iterator[Door]:
    found = Door(("127.0.0.1", 0))
    found.open(WORD)
    yield found
    found.close()


def call(address: tuple[str, int], data: bytes) -> socket.socket:
    stranger = socket.create_connection(address, timeout=10)
    with contextlib.suppress(ConnectionError):  # it may have been hung up on already
        stranger.sendall(data)
    return stranger


def assert_a_rank_gets_in(opened: Door, within_s: float = 2.0) -> None:
    start = time.monotonic()
    with knock(opened.address, WORD, 3, within_s) as rank:
        caller = opened.next(within_s)
        assert caller is not None
        assert caller.rank == 3
        caller.connected.sendall(b"welcome")
        assert rank.recv(7) == b"welcome"
        caller.connected.close()
    assert time.monotonic() - start < within_s


GARBAGE = {
    "nothing": b"",
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 10,
    "wrong word": HELLO.pack(b"?" * WORD_BYTES, 1, 2),
    "a secret that is no ascii": '{"op": "hello", "secret": "é", "rank": 0, "pid": 1}'.encode(),
    "deep json": struct.pack("!I", 200_000) + b"[" * 200_000,
    "deep msgpack": b"\x91" * 200_000,
    "a GiB announced": struct.pack("!I", ONE_GIB) + b"x" * 100_000,
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_hung_up_on_and_ranks_get_in(opened: Door, data: bytes) -> None:
    with call(opened.address, data) as stranger:
        stranger.shutdown(socket.SHUT_WR)
        assert stranger.recv(100) == b""
        assert_a_rank_gets_in(opened)
    assert opened.next(0.05) is None


def test_the_rest_of_a_long_hello_is_ignored_and_not_kept(opened: Door) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with call(opened.address, b"x" * 1000) as stranger, pytest.raises(ConnectionError):
        stranger.sendall(bytes(64 << 20))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10  # KiB
    assert_a_rank_gets_in(opened)


def test_idle_callers_hold_nobody_up(opened: Door) -> None:
    idle = [call(opened.address, b"") for _ in range(2 * MAX_CALLERS)]
    assert_a_rank_gets_in(opened)
    for stranger in idle:
        stranger.close()


def drip(stranger: socket.socket, count: int) -> None:
    for _ in range(count):
        stranger.sendall(b"0")
        time.sleep(0.1)


def test_a_hello_has_one_deadline_however_it_drips(opened: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "HELLO_S", 0.5)
    start = time.monotonic()
    with call(opened.address, b"") as stranger, pytest.raises(ConnectionError):
        drip(stranger, HELLO.size - 1)
    assert time.monotonic() - start < 2.0


def test_nobody_builds_up_while_nobody_is_expected() -> None:
    """While serving: callers are heard and hung up on, also those with a word that held once."""
    shut = Door(("127.0.0.1", 0))
    try:
        shut.open(WORD)
        with knock(shut.address, WORD, 0, 5) as late:
            time.sleep(0.1)
            shut.shut()
            assert late.recv(1) == b""
        for _ in range(300):  # more than the backlog holds
            with call(shut.address, HELLO.pack(WORD, 1, 2)) as stranger:
                assert stranger.recv(1) == b""
        assert shut.next(0.05) is None
        other = word_of("another group's")
        shut.open(other)
        with knock(shut.address, other, 1, 5):
            caller = shut.next(5)
            assert caller is not None
            caller.connected.close()
    finally:
        shut.close()


@pytest.mark.parametrize("secret", ["word", "é \udcff", "x" * 100_000])
def test_any_secret_will_do(secret: str) -> None:
    door = Door(("127.0.0.1", 0))
    try:
        door.open(word_of(secret))
        for said, is_let_in in (("wrong", False), (secret, True)):
            with knock(door.address, word_of(said), 1, 5):
                link = next_link(door, 5.0 if is_let_in else 0.2)
                assert (link is not None) == is_let_in
                if link is not None:
                    link.channel.close()
    finally:
        door.close()
