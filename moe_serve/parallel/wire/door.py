"""Door: a listening socket that lets in callers who say its word, and hangs up on all others.

A hello has a fixed size and is compared as bytes: before the word is known, nothing is parsed and no length that a
stranger announces is believed. One thread hears all callers side by side, each until its own deadline. It also does so
while no rank is expected, so that no backlog builds up. Knows sockets; knows no messages.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import queue
import secrets
import selectors
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from typing import NamedTuple

WORD_BYTES = 32
HELLO = struct.Struct(f"!{WORD_BYTES}sII")
"""The word, and the caller's rank and process id."""
HELLO_S = 5.0
"""For the whole hello, from the connection on."""
MAX_CALLERS = 64
"""Heard at a time; one more ends the oldest call. A rank says its hello at once."""
MAX_IGNORED_BYTES = 1 << 20
"""What a stranger may still send after the hello before the connection is reset."""


class Caller(NamedTuple):
    """A rank that said the word."""

    rank: int
    pid: int
    connected: socket.socket


@dataclass
class _Call:
    """A connection that is not let in yet, or never will be."""

    connected: socket.socket
    deadline_s: float
    said: bytearray = field(default_factory=bytearray)
    ignored: int = 0
    is_stranger: bool = False


def word_of(secret: str) -> bytes:
    """32 bytes that stand for a secret of any length and any characters."""
    return hashlib.sha256(os.fsencode(secret)).digest()


def knock(address: tuple[str, int], word: bytes, rank: int, timeout_s: float) -> socket.socket:
    """Connect and say hello, as often as it takes until a door is there. OSError when time is up."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            connected = socket.create_connection(address, timeout=5)
            connected.sendall(HELLO.pack(word, rank, os.getpid()))
            connected.settimeout(None)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return connected


class Door:
    """Shut at first: then every caller is a stranger."""

    def __init__(self, address: tuple[str, int]) -> None:
        """Listens at (host, port); port 0 is one of the system's choosing."""
        self._listener = socket.create_server(address, backlog=128)
        self._listener.setblocking(False)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._word = secrets.token_bytes(WORD_BYTES)
        self._callers: queue.SimpleQueue[tuple[bytes, Caller]] = queue.SimpleQueue()
        self._calls: dict[socket.socket, _Call] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._is_closed = False
        self._thread = threading.Thread(target=self._hear, name="door", daemon=True)
        self._thread.start()

    def open(self, word: bytes) -> None:
        """From now on callers who say `word`, WORD_BYTES long, are let in."""
        self._word = word

    def shut(self) -> None:
        """From now on every caller is a stranger; those let in and not taken yet are hung up on."""
        self.open(secrets.token_bytes(WORD_BYTES))
        self.next(0.0)

    def next(self, timeout_s: float) -> Caller | None:
        """The next caller who said the word that now holds; None if there is none in time."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                word, caller = self._callers.get(timeout=max(1e-3, deadline - time.monotonic()))
            except queue.Empty:
                return None
            if word == self._word:
                return caller
            caller.connected.close()

    def close(self) -> None:
        """Stop listening. Connections that were let in stay."""
        self._is_closed = True
        with contextlib.suppress(OSError):  # wakes the thread
            socket.create_connection(self.address, timeout=1).close()
        self._thread.join(2 * HELLO_S)

    def _hear(self) -> None:
        while not self._is_closed:
            for key, _ in self._selector.select(self._patience_s()):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj in self._calls:  # it may have made room for a newer one just now
                    self._read(key.data)
            now = time.monotonic()
            for call in [call for call in self._calls.values() if call.deadline_s <= now]:
                self._hang_up(call)
        for call in list(self._calls.values()):
            self._hang_up(call)
        self._selector.close()
        self._listener.close()

    def _patience_s(self) -> float | None:
        """Until the next deadline."""
        if not self._calls:
            return None
        return max(0.0, min(call.deadline_s for call in self._calls.values()) - time.monotonic())

    def _accept(self) -> None:
        try:
            connected, _ = self._listener.accept()
        except OSError:  # the caller has gone, or this process has no file descriptor left
            time.sleep(0.01)
            return
        connected.setblocking(False)
        if len(self._calls) >= MAX_CALLERS:
            self._hang_up(next(iter(self._calls.values())))
        call = self._calls[connected] = _Call(connected, time.monotonic() + HELLO_S)
        self._selector.register(connected, selectors.EVENT_READ, call)

    def _read(self, call: _Call) -> None:
        try:
            data = call.connected.recv(1 << 16 if call.is_stranger else HELLO.size - len(call.said))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._hang_up(call)
        elif call.is_stranger:
            call.ignored += len(data)
            if call.ignored > MAX_IGNORED_BYTES:
                self._hang_up(call)
        else:
            call.said += data
            if len(call.said) == HELLO.size:
                self._judge(call)

    def _judge(self, call: _Call) -> None:
        """Let the caller in, or end our side: a stranger's rest is read and ignored, so that it sees an end."""
        word, rank, pid = HELLO.unpack(call.said)
        if hmac.compare_digest(word, self._word):
            self._forget(call)
            call.connected.setblocking(True)
            self._callers.put((word, Caller(rank, pid, call.connected)))
            return
        call.is_stranger = True
        with contextlib.suppress(OSError):  # it may have gone
            call.connected.shutdown(socket.SHUT_WR)

    def _forget(self, call: _Call) -> None:
        self._selector.unregister(call.connected)
        del self._calls[call.connected]

    def _hang_up(self, call: _Call) -> None:
        self._forget(call)
        call.connected.close()
