"""A streaming client that costs little: one request, one connection, a line at a time.

httpx takes about as much CPU per event as the server does; on a machine where both share the cores, that
would be measured as the server's. Times are of time.monotonic.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class End(StrEnum):
    """How a request ended, as its client sees it."""

    DONE = "done"
    """200, every token, [DONE]."""
    REFUSED = "refused"
    """503 with Retry-After, before anything was computed."""
    TOLD = "told"
    """Accepted, then ended by an error event or an error status that says why."""
    UNREACHED = "unreached"
    """The server took no connection: it was never asked."""
    LOST = "lost"
    """Broken off, or an answer that breaks a promise. There must be none."""


@dataclass(slots=True)
class Answer:
    """One request's outcome."""

    sent_s: float
    end: End = End.LOST
    status: int = 0
    ttft_s: float = 0.0
    latency_s: float = 0.0
    num_events: int = 0
    note: str = ""
    event_times_s: list[float] = field(default_factory=list)


class BrokenPromiseError(Exception):
    """An answer that is not what HTTP or the API says."""


async def ask(host: str, port: int, path: str, body: dict[str, Any], keep_times: bool = False) -> Answer:
    """Send one streamed request and read its answer; never raises for what the server does."""
    answer = Answer(time.monotonic())
    try:
        reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)
    except OSError as error:
        answer.end, answer.note = End.UNREACHED, type(error).__name__
        return answer
    try:
        writer.write(_request_bytes(host, path, body))
        await _read_answer(reader, answer, keep_times)
    except (OSError, EOFError, ValueError, BrokenPromiseError) as error:
        answer.end, answer.note = End.LOST, f"{type(error).__name__} {error} after {answer.num_events} events"
    finally:
        writer.close()
    answer.latency_s = time.monotonic() - answer.sent_s
    return answer


def _request_bytes(host: str, path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content


async def _read_answer(reader: asyncio.StreamReader, answer: Answer, keep_times: bool) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    answer.status = int(head.split(" ", 2)[1])
    if answer.status != 200:
        text = (await reader.read()).decode(errors="replace")
        has_retry = "\r\nretry-after:" in head.lower()
        answer.end = (
            End.REFUSED if answer.status == 503 and has_retry else End.TOLD if answer.status >= 500 else End.LOST
        )
        answer.note = text[:300]
        return
    await _read_events(reader, answer, keep_times)


async def _read_events(reader: asyncio.StreamReader, answer: Answer, keep_times: bool) -> None:
    """Server-sent events until [DONE]. Chunk sizes are lines too, and are passed over."""
    error = ""
    while True:
        line = await reader.readline()
        if not line:
            raise BrokenPromiseError("the stream ended without [DONE]")
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            answer.end, answer.note = (End.TOLD, error) if error else (End.DONE, "")
            return
        if line.startswith(b'data: {"error"'):
            error = line.decode()[6:300]
            continue
        now_s = time.monotonic() - answer.sent_s
        answer.ttft_s = answer.ttft_s or now_s
        answer.num_events += 1
        if keep_times:
            answer.event_times_s.append(now_s)
