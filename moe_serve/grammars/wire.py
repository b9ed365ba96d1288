"""Messages between the server, the zygote and the grammar processes.

A message is its length, in 4 bytes, and its bytes. A step's message and its answer are arrays of 32-bit numbers.
Knows sockets; knows no grammars.
"""

from __future__ import annotations

import socket
import struct
import time
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LENGTH = struct.Struct("=I")
WORD_BYTES = 4
STILL_ENDING = -1
"""The zygote's answer for a process that was killed and has not ended yet."""


def send(channel: socket.socket, message: bytes) -> None:
    """Send all of a message. OSError: the other side has gone."""
    channel.sendall(LENGTH.pack(len(message)) + message)


def receive(channel: socket.socket, deadline_s: float | None = None) -> bytes:
    """The next message. EOFError: the other side has gone. TimeoutError: not there at `deadline_s` (monotonic)."""
    head = bytearray(LENGTH.size)
    receive_into(channel, memoryview(head), deadline_s)
    body = bytearray(LENGTH.unpack(head)[0])
    receive_into(channel, memoryview(body), deadline_s)
    return bytes(body)


def receive_into(channel: socket.socket, target: memoryview, deadline_s: float | None = None) -> None:
    """Fill `target`, a view of bytes. Errors of `receive` apply."""
    while target:
        if deadline_s is not None:
            channel.settimeout(max(deadline_s - time.monotonic(), 1e-3))
        count = channel.recv_into(target)
        if not count:
            raise EOFError
        target = target[count:]


@dataclass(frozen=True, slots=True)
class Step:
    """What one grammar's process is asked for in one step."""

    num_words: int
    """Length of a mask, in words of 32 tokens."""
    rows: Sequence[tuple[int, Sequence[int]]]
    """(matcher, its new tokens) of each mask that is wanted; an unknown matcher begins."""
    forgotten: Sequence[int] = ()
    """Matchers that are not used any more."""

    def pack(self) -> bytes:
        numbers = array("I", (self.num_words, len(self.forgotten), *self.forgotten))
        for matcher, tokens in self.rows:
            numbers.extend((matcher, len(tokens)))
            numbers.extend(tokens)
        return numbers.tobytes()

    @staticmethod
    def unpack(message: bytes) -> Step:
        numbers = array("I", message)
        at = 2 + numbers[1]
        forgotten, rows = numbers[2:at], []
        while at < len(numbers):
            count = numbers[at + 1]
            rows.append((numbers[at], numbers[at + 2 : at + 2 + count].tolist()))
            at += 2 + count
        return Step(numbers[0], rows, forgotten.tolist())


def pack_words(words: Iterable[int]) -> bytes:
    return array("I", words).tobytes()


def unpack_words(message: bytes | bytearray) -> list[int]:
    return array("I", bytes(message)).tolist()
