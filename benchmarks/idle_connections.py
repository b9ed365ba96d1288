"""Ten thousand idle connections: do they slow other clients down?

    python benchmarks/idle_connections.py [--connections 10000]

Starts a server on the demo model and measures a short request and /health, then opens the connections, each
having asked /health once (an HTTP client's pool, idle), measures the same again, and drops them all at once.
Passed: with the idle ones the median request takes at most 1.5 times as long, memory grows by at most 20 KB
per connection, and afterwards the server has none of them left. Both processes need that many open files:
the hard limit (ulimit -Hn) must allow it. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from lean_client import End, ask
from measuring import hardware, rss_mb
from soak import DEMO
from soak_server import StartedServer

PROBE = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
BODY = {"prompt": "Once", "max_tokens": 16, "ignore_eos": True, "stream": True}
ALLOWED_SLOWDOWN = 1.5
ALLOWED_KB = 20.0
BATCH = 200
SETTLE_S = 2.0

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def probe(port: int, repeats: int) -> dict[str, float]:
    """Median seconds of a short request, alone."""
    answers = [await ask("127.0.0.1", port, "/v1/completions", BODY) for _ in range(repeats)]
    failed = [a for a in answers if a.end is not End.DONE]
    if failed:
        raise SystemExit(f"a request failed: {failed[0]}")
    return {"request_p50_s": round(statistics.median(a.latency_s for a in answers), 4)}


async def open_idle(port: int, count: int) -> list[Connection]:
    """Connections that have had one answer and keep the line open."""

    async def one() -> Connection:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(PROBE)
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]))
        return reader, writer

    found: list[Connection] = []
    while len(found) < count:
        found += await asyncio.gather(*(one() for _ in range(min(BATCH, count - len(found)))))
    return found


def num_sockets(pid: int) -> int:
    return sum(1 for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink() and "socket" in str(fd.readlink()))


async def run(args: argparse.Namespace, server: StartedServer) -> dict[str, Any]:
    assert server.pid is not None
    port = int(server.url.rsplit(":", 1)[1])
    await probe(port, args.repeats)
    before, before_mb = await probe(port, args.repeats), rss_mb(server.pid)
    await asyncio.sleep(SETTLE_S)  # the last probe's connection is still being closed
    before_sockets = num_sockets(server.pid)
    start_s = time.monotonic()
    idle = await open_idle(port, args.connections)
    opened_s = time.monotonic() - start_s
    during, during_mb, held = await probe(port, args.repeats), rss_mb(server.pid), num_sockets(server.pid)
    still_open = sum(not reader.at_eof() for reader, _ in idle)
    for _, writer in idle:
        writer.transport.abort()
    await asyncio.sleep(SETTLE_S)
    after = await probe(port, args.repeats)
    return {
        "connections": args.connections,
        "opened_s": round(opened_s, 2),
        "held": held - before_sockets,
        "still_open": still_open,
        "before": before,
        "during": during,
        "after": after,
        "kb_per_connection": round((during_mb["RssAnon"] - before_mb["RssAnon"]) * 1000 / args.connections, 2),
        "left": num_sockets(server.pid) - before_sockets,
    }


def faults(found: dict[str, Any]) -> list[str]:
    told = []
    if found["held"] < found["connections"]:
        told.append(f"only {found['held']} of {found['connections']} connections are held")
    if found["during"]["request_p50_s"] > ALLOWED_SLOWDOWN * found["before"]["request_p50_s"]:
        told.append(f"requests slow down: {found['before']} to {found['during']}")
    if found["kb_per_connection"] > ALLOWED_KB:
        told.append(f"{found['kb_per_connection']} KB per connection")
    if found["left"] > 1:
        told.append(f"{found['left']} sockets are left")
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < args.connections + 512:
        raise SystemExit(f"the limit of open files is {hard}; raise it: ulimit -Hn {args.connections + 512}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    server = StartedServer(str(DEMO), ["--kv-cache-mib", "64"])
    try:
        found = asyncio.run(run(args, server))
        health = httpx.get(f"{server.url}/health", timeout=30).json()
    finally:
        server.stop()
    found["faults"] = faults(found) + server_faults(health)
    print(json.dumps({"benchmark": "idle_connections", "passed": not found["faults"], **found, "hardware": hardware()}))
    return 1 if found["faults"] else 0


def server_faults(health: dict[str, str]) -> list[str]:
    return [] if health == {"status": "ready"} else [f"afterwards /health says {health}"]


if __name__ == "__main__":
    sys.exit(main())
