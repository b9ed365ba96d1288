"""How long /live takes, asked from a process of its own until its input ends; prints JSON of the times then.

    python benchmarks/live_probe.py PORT < a pipe

Asks every 20 ms over one connection, and over a new one every second. Imports nothing of ours.
"""

from __future__ import annotations

import http.client
import json
import select
import sys
import time

PAUSE_S = 0.02
RECONNECT_EVERY = 50
TIMEOUT_S = 60


def ask(connection: http.client.HTTPConnection) -> float:
    """Seconds until /live has answered; OSError or HTTPException: it has not."""
    start_s = time.monotonic()
    connection.request("GET", "/live")
    response = connection.getresponse()
    response.read()
    if response.status != 200:
        raise http.client.HTTPException(f"/live says {response.status}")
    return time.monotonic() - start_s


def probe(port: int) -> dict[str, float]:
    """Times until standard input ends."""
    times_s: list[float] = []
    failures = 0
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    while not select.select([sys.stdin], [], [], PAUSE_S)[0]:
        try:
            times_s.append(ask(connection))
        except (OSError, http.client.HTTPException):
            failures += 1
            connection.close()
        if len(times_s) % RECONNECT_EVERY == 0:
            connection.close()
    return {"asked": len(times_s), "failed": failures, **percentiles(times_s)}


def percentiles(times_s: list[float]) -> dict[str, float]:
    ordered = sorted(times_s) or [0.0]

    def at(fraction: float) -> float:
        return round(ordered[min(int(len(ordered) * fraction), len(ordered) - 1)], 4)

    return {"p50_s": at(0.5), "p99_s": at(0.99), "max_s": at(1.0)}


if __name__ == "__main__":
    print(json.dumps(probe(int(sys.argv[1]))))
