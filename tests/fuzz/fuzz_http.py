"""Fuzz HTTP: whatever bytes come, in whatever pieces, a real server lives, and answers no 5xx but 503 and 505.

505 goes to a request of another version of HTTP alone, as RFC 9110 (15.6.6) names it; 503 means a full queue.

    python tests/fuzz/fuzz_http.py --minutes 10

The server is `moe-serve serve` in a process of its own; /live is asked from a third one all the while, and memory is
looked at in the end. A failure prints its seed and bytes; put them into KEPT, which every run sends first.
"""

from __future__ import annotations

import asyncio
import random
import re
import socket
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.fuzz.harness import fuzz_for_minutes
from tests.fuzz.http_requests import Ending, Script, script
from tests.fuzz.watched_server import WatchedServer, watched_server

CLIENTS = 8
ANSWER_S = 10.0
"""A client waits so long for the end of what comes; a request that is not complete gets none."""
QUIET_S = 0.5
"""Nothing more has come: the answer is over, or none will come."""
STATUS = re.compile(rb"^HTTP/1\.[01] (\d{3}) ", re.MULTILINE)
KEPT = [Script([b"M-SEARCH /metrics HTTP/1.1\r\nHost: h\r\n\r\nno HTTP\r\n\r\n"], [0.0], Ending.RESET)]
"""What once ended a server, or was a 5xx."""
Properties = dict[str, Callable[[int, int], int]]


async def play(port: int, played: Script) -> bytes:
    """Everything that the server says to one client."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    heard = b""
    with suppress(OSError):
        for pause_s, piece in zip(played.pauses_s, played.pieces, strict=True):
            await asyncio.sleep(pause_s)
            writer.write(piece)
            await asyncio.wait_for(writer.drain(), ANSWER_S)
        if played.ending is Ending.HALF_CLOSE:
            writer.write_eof()
        if played.ending in (Ending.READ, Ending.HALF_CLOSE):
            heard = await _hear(reader)
        if played.ending is Ending.RESET:
            sock: socket.socket = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort() if played.ending is Ending.RESET else writer.close()
    return heard


async def _hear(reader: asyncio.StreamReader) -> bytes:
    heard = b""
    with suppress(TimeoutError, OSError):
        async with asyncio.timeout(ANSWER_S):
            while True:
                patience_s = QUIET_S if heard else ANSWER_S / 5
                piece = await asyncio.wait_for(reader.read(1 << 16), patience_s)
                if not piece:
                    break
                heard += piece
    return heard


def errors_in(heard: bytes) -> list[str]:
    """Status codes that no request may cause."""
    found = [status.decode() for status in STATUS.findall(heard)]
    return [status for status in found if status.startswith("5") and status not in ("503", "505")]


class HttpFuzzer:
    """Sends scripts to one server and counts the statuses that came."""

    def __init__(self, watched: WatchedServer) -> None:
        self.watched = watched
        self.statuses: Counter[str] = Counter()

    def run(self, seed: int, examples: int) -> int:
        """The connections of a seed, a few at a time; AssertionError says which of them broke a promise."""
        scripts = [*KEPT, *(script(random.Random(f"{seed}/{i}")) for i in range(examples))]
        asyncio.run(self._run(seed, scripts))
        self.watched.check()
        return len(scripts)

    async def _run(self, seed: int, scripts: list[Script]) -> None:
        waiting = iter(enumerate(scripts))
        await asyncio.gather(*(self._client(seed, waiting) for _ in range(CLIENTS)))

    async def _client(self, seed: int, waiting: Iterator[tuple[int, Script]]) -> None:
        for number, played in waiting:
            try:
                heard = await play(self.watched.port, played)
            except OSError as error:
                raise AssertionError(f"seed {seed}/{number}: {error}; before it: {played}") from error
            self.statuses.update(status.decode() for status in STATUS.findall(heard))
            assert not errors_in(heard), f"seed {seed}/{number}: {errors_in(heard)} to {played}"

    def report(self) -> dict[str, Any]:
        return {"statuses": dict(self.statuses), **self.watched.report()}


@contextmanager
def opened() -> Iterator[HttpFuzzer]:
    with watched_server("--read-timeout-s", "5") as watched:
        yield HttpFuzzer(watched)


if __name__ == "__main__":
    with opened() as fuzzer:
        fuzz_for_minutes({"http": fuzzer.run}, fuzzer.report)
