"""The clients of soak.py: 64 impolite users of an OpenAI-compatible server, for a number of minutes.

Run by soak.py as a process of its own, so that its memory and CPU are not the server's. The last
line of output is one JSON object: how often each outcome occurred, and the first few faults.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
from soak_requests import BAD, Fate, Plan, make_bad, make_plan

REQUEST_TIMEOUT_S = 120.0
"""A request that takes longer counts as stuck."""
MAX_FAULTS = 20


class Fault(Exception):
    """The server broke a promise."""


@dataclass
class Tally:
    """What happened, over all clients."""

    outcomes: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    output_events: int = 0

    def fault(self, plan: Plan, message: str) -> None:
        self.outcomes["fault"] += 1
        if len(self.faults) < MAX_FAULTS:
            self.faults.append(f"{plan.path} {json.dumps(plan.body)[:300]}: {message}")


async def client(url: str, deadline: float, rng: random.Random, tally: Tally) -> None:
    """Send one request after another until the deadline."""
    async with httpx.AsyncClient(base_url=url, timeout=REQUEST_TIMEOUT_S) as http:
        while time.monotonic() < deadline:
            plan = make_bad(rng) if rng.random() < BAD else make_plan(rng)
            try:
                tally.outcomes[await one_request(http, plan, tally)] += 1
            except Fault as fault:
                tally.fault(plan, str(fault))
            except httpx.HTTPError as error:
                tally.fault(plan, f"{type(error).__name__} {error}")


async def one_request(http: httpx.AsyncClient, plan: Plan, tally: Tally) -> str:
    """Play one plan; returns its outcome, raises Fault when the server misbehaved."""
    if plan.fate is Fate.LEAVE_EARLY:
        return await leave_early(http, plan, tally)
    async with http.stream("POST", plan.path, content=plan.content, headers=plan.headers) as response:
        tally.statuses[response.status_code] += 1
        if response.status_code == 503:
            return await _overloaded(response)
        if plan.expect_refusal:
            return await _refused(response)
        if response.status_code != 200:
            raise Fault(f"status {response.status_code}: {(await response.aread())[:300]!r}")
        if plan.body.get("stream"):
            return await read_stream(response, plan, tally)
        check_whole(await response.aread(), plan)
        return "whole"


async def leave_early(http: httpx.AsyncClient, plan: Plan, tally: Tally) -> str:
    """Hang up after a moment, usually before the first token."""

    async def send() -> None:
        async with http.stream("POST", plan.path, content=plan.content, headers=plan.headers) as response:
            tally.statuses[response.status_code] += 1
            await response.aread()

    task = asyncio.create_task(send())
    _, pending = await asyncio.wait({task}, timeout=plan.patience_s)
    if not pending:
        task.result()
        return "finished_before_leaving"
    task.cancel()
    await asyncio.wait({task})
    return "left_early"


async def _overloaded(response: httpx.Response) -> str:
    if "retry-after" not in response.headers:
        raise Fault("503 without Retry-After")
    await asyncio.sleep(min(2.0, float(response.headers["retry-after"])))
    return "overloaded"


async def _refused(response: httpx.Response) -> str:
    body = await response.aread()
    if not 400 <= response.status_code < 500 or "error" not in json.loads(body):
        raise Fault(f"a bad request was answered {response.status_code}: {body[:200]!r}")
    return "refused"


async def read_stream(response: httpx.Response, plan: Plan, tally: Tally) -> str:
    """Read server-sent events to the end, or hang up after `plan.leave_after` of them."""
    finished: set[int] = set()
    seen = 0
    last = ""
    async for data in events(response):
        last = data
        seen += 1
        tally.output_events += 1
        if plan.fate is Fate.HANG_UP and seen >= plan.leave_after:
            return "hung_up"
        if data != "[DONE]":
            finished |= _finished_choices(json.loads(data))
    if last != "[DONE]":
        raise Fault(f"the stream ended with {last[:100]!r}, not [DONE]")
    if finished != set(range(plan.num_choices)):
        raise Fault(f"{plan.num_choices} choices wanted, {sorted(finished)} finished")
    return "streamed"


async def events(response: httpx.Response) -> AsyncIterator[str]:
    """The data of each event."""
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield line[6:]


def _finished_choices(chunk: dict[str, Any]) -> set[int]:
    if "error" in chunk:
        raise Fault(f"an error event: {chunk['error']}")
    return {c["index"] for c in chunk["choices"] if c.get("finish_reason")}


def check_whole(body: bytes, plan: Plan) -> None:
    """An answer in one piece has every choice, each with a reason to have ended."""
    choices = json.loads(body)["choices"]
    if [c["index"] for c in choices] != list(range(plan.num_choices)):
        raise Fault(f"{plan.num_choices} choices wanted, got {[c['index'] for c in choices]}")
    if not all(c["finish_reason"] in ("stop", "length") for c in choices):
        raise Fault(f"finish reasons {[c['finish_reason'] for c in choices]}")


async def run(url: str, clients: int, minutes: float, seed: int) -> Tally:
    """All clients until the time is up; the requests then in flight are still read to their end."""
    tally = Tally()
    deadline = time.monotonic() + minutes * 60
    await asyncio.gather(*(client(url, deadline, random.Random(seed * 1000 + i), tally) for i in range(clients)))
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tally = asyncio.run(run(args.url, args.clients, args.minutes, args.seed))
    print(json.dumps(vars(tally)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
