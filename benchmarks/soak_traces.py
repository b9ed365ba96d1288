"""Recorded arrivals against a server of ours: 80 % of capacity, three times capacity, and SIGTERM under load.

    python benchmarks/soak_traces.py --traces /path/to/arrivals [--minutes 30] [--model FOLDER]

1. capacity: as many clients as the batch has seats, without pause. Requests per second is the capacity.
2. calibration at 80 %: twice its longest time to first token becomes --max-queue-wait (or give one): what the
   bursts of half an hour may need, beyond those of two minutes. The server restarts.
3. steady: --minutes at 80 %. No error and no refusal may occur, and memory must not climb. In a virtual machine, how
   much of it was taken meanwhile is told as well, and how many refusals came then: no capacity, no promise.
4. overload: 3x capacity. The excess must be refused with 503 and Retry-After; accepted requests must
   start within twice the time of the steady phase, in the median and at p99.
5. end: SIGTERM under steady load. Every accepted request must finish or be told; none may break off.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from lean_client import Answer, End, ask
from measuring import hardware, versions
from soak import DEMO, GROWTH_LIMIT_MB, MemoryLog, growth
from soak_server import StartedServer
from steal_log import StealLog
from trace_requests import TraceRequest, read_requests, schedule

from moe_serve.loadtest.summary import percentile

TRACES = ("AzureLLMInferenceTrace_conv.csv", "mooncake_conversation_trace.jsonl")
PATH = "/v1/completions"
STEADY = 0.8
OVERLOAD = 3.0
TTFT_FACTOR = 2.0
BURST_FACTOR = 2.0


class Target:
    """The server under load."""

    def __init__(self, args: argparse.Namespace, max_queue_wait_s: float | None) -> None:
        flags = ["--max-num-seqs", str(args.max_num_seqs), "--num-kv-pages", str(args.num_kv_pages)]
        flags += ["--shutdown-timeout-s", str(args.shutdown_timeout)]
        if max_queue_wait_s is not None:
            flags += ["--max-queue-wait-s", f"{max_queue_wait_s:.3f}"]
        self.server = StartedServer(args.model, flags)
        self.host, port = self.server.url.removeprefix("http://").split(":")
        self.port = int(port)

    async def ask(self, request: TraceRequest) -> Answer:
        return await ask(self.host, self.port, PATH, request.body)

    def facts(self) -> tuple[int, int]:
        """Context length, and a safe bound of the vocabulary."""
        card = httpx.get(f"{self.server.url}/v1/models", timeout=30).json()["data"][0]
        config = json.loads((Path(card["root"]) / "config.json").read_text())
        return int(card["max_model_len"]), int(config["vocab_size"])


async def closed_loop(target: Target, requests: Sequence[TraceRequest], clients: int, duration_s: float) -> float:
    """Finished requests per second with `clients` at a time, over the second half of `duration_s`."""
    source = itertools.cycle(requests)
    start_s = time.monotonic()
    ends: list[float] = []

    async def client() -> None:
        while time.monotonic() - start_s < duration_s:
            answer = await target.ask(next(source))
            if answer.end is not End.DONE:
                raise SystemExit(f"the capacity run failed: {answer}")
            ends.append(time.monotonic() - start_s)

    await asyncio.gather(*(client() for _ in range(clients)))
    counted = [end for end in ends if duration_s / 2 <= end < duration_s]
    return len(counted) / (duration_s / 2)


async def open_loop(target: Target, requests: Sequence[TraceRequest]) -> list[Answer]:
    """Every request at its time, whatever became of those before it."""
    start_s = time.monotonic()

    async def one(request: TraceRequest) -> Answer:
        return await target.ask(request)

    tasks = []
    for request in requests:
        await asyncio.sleep(start_s + request.arrival_s - time.monotonic())
        tasks.append(asyncio.create_task(one(request)))
    return list(await asyncio.gather(*tasks))


def report(answers: Sequence[Answer]) -> dict[str, Any]:
    """How requests ended, and how long those that finished took to start."""
    ttfts = [a.ttft_s for a in answers if a.end is End.DONE]
    problems = Counter(a.note for a in answers if a.end in (End.LOST, End.TOLD, End.UNREACHED))
    return {
        "requests": len(answers),
        "ends": dict(Counter(str(a.end) for a in answers)),
        "ttft_p50_s": round(percentile(ttfts, 50), 4),
        "ttft_p99_s": round(percentile(ttfts, 99), 4),
        "ttft_max_s": round(max(ttfts, default=0.0), 4),
        "refusal_mean_s": _mean([a.latency_s for a in answers if a.end is End.REFUSED]),
        "output_tokens": sum(a.num_events for a in answers),
        "problems": dict(problems.most_common(5)),
    }


def _mean(values: Sequence[float]) -> float:
    return round(statistics.fmean(values), 4) if values else 0.0


async def end_under_load(target: Target, requests: Sequence[TraceRequest], after_s: float) -> dict[str, Any]:
    """SIGTERM in the middle of a run; seconds until the process was gone, and what its clients saw."""
    assert target.server.pid is not None
    run = asyncio.create_task(open_loop(target, requests))
    await asyncio.sleep(after_s)
    signalled_s = time.monotonic()
    os.kill(target.server.pid, signal.SIGTERM)
    status = await asyncio.to_thread(target.server.wait)
    gone_s = time.monotonic() - signalled_s
    answers = await run
    in_flight = [a for a in answers if a.sent_s < signalled_s < a.sent_s + a.latency_s]
    return {
        **report(answers),
        "exit_status": status,
        "gone_after_s": round(gone_s, 2),
        "in_flight_at_sigterm": len(in_flight),
        "their_ends": dict(Counter(str(a.end) for a in in_flight)),
    }


def faults(result: dict[str, Any]) -> list[str]:
    """What was promised and not kept."""
    steady, overload, end = result["steady"], result["overload"], result["end"]
    found = []
    if set(steady["ends"]) != {"done"}:
        found.append(f"at 80 %: {steady['ends']} {steady['problems']}")
    if result["memory"]["climb_mb"] > GROWTH_LIMIT_MB:
        found.append(f"memory climbs: {result['memory']}")
    if set(overload["ends"]) - {"done", "refused"} or "refused" not in overload["ends"]:
        found.append(f"at 3x: {overload['ends']} {overload['problems']}")
    for key in ("ttft_p50_s", "ttft_p99_s"):
        if overload[key] > TTFT_FACTOR * steady[key]:
            found.append(f"{key} at 3x is {overload[key] / steady[key]:.2f} times that at 80 %")
    if "lost" in end["ends"] or end["exit_status"] != 0:
        found.append(f"SIGTERM: {end}")
    return found


async def run(args: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"benchmark": "soak_traces", "minutes": args.minutes, "max_num_seqs": args.max_num_seqs}
    target = Target(args, None)
    max_len, vocab_size = target.facts()
    traces = [read_requests(args.traces / name, max_len, vocab_size) for name in TRACES]
    mixed = list(itertools.chain.from_iterable(zip(*traces, strict=False)))
    capacity = await closed_loop(target, mixed, args.max_num_seqs, args.capacity_s)
    result["capacity_requests_per_s"] = round(capacity, 2)
    _say(f"capacity {capacity:.2f} requests/s")
    wait_s = args.max_queue_wait
    if wait_s is None:
        calibration = report(await open_loop(target, schedule(traces, STEADY * capacity, args.calibration_s)))
        result["calibration"] = calibration
        wait_s = BURST_FACTOR * calibration["ttft_max_s"]
        _say(f"calibration {calibration}")
    target.server.stop()
    result["max_queue_wait_s"] = round(wait_s, 3)

    target = Target(args, wait_s)
    assert target.server.pid is not None
    warm_up = schedule(traces, STEADY * capacity, args.warm_up_s)
    await open_loop(target, warm_up)
    memory, steal = MemoryLog(target.server.pid), StealLog()
    memory.start()
    steal.start()
    answers = await open_loop(target, schedule(traces, STEADY * capacity, args.minutes * 60))
    memory.stop()
    steal.stop()
    result["steady"] = report(answers)
    result["steal"] = steal.summary(a.sent_s for a in answers if a.end is End.REFUSED)
    result["memory"] = growth(memory.samples)
    _say(f"steady {result['steady']} steal {result['steal']} memory {result['memory']}")
    result["overload"] = report(await open_loop(target, schedule(traces, OVERLOAD * capacity, args.overload_s)))
    _say(f"overload {result['overload']}")
    result["log_faults"] = target.server.check()
    await asyncio.sleep(args.pause_s)
    last = schedule(traces, STEADY * capacity, args.end_s)
    result["end"] = await end_under_load(target, last, args.end_s / 2)
    result["ttft_ratio"] = {
        key: round(result["overload"][f"ttft_{key}_s"] / (result["steady"][f"ttft_{key}_s"] or 1), 2)
        for key in ("p50", "p99")
    }
    return result


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True, help=f"folder with {' and '.join(TRACES)}")
    parser.add_argument("--minutes", type=float, default=30.0, help="of the steady phase")
    parser.add_argument("--model", default=str(DEMO), help="checkpoint folder; default: the demo model")
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument(
        "--num-kv-pages", type=int, default=1024, help="few enough that all are touched before memory is watched"
    )
    parser.add_argument("--max-queue-wait", type=float, help="seconds; default: from the calibration")
    parser.add_argument("--capacity-s", type=float, default=60.0)
    parser.add_argument("--calibration-s", type=float, default=120.0)
    parser.add_argument("--warm-up-s", type=float, default=30.0)
    parser.add_argument("--overload-s", type=float, default=180.0)
    parser.add_argument("--pause-s", type=float, default=5.0, help="between the overload and the last phase")
    parser.add_argument("--end-s", type=float, default=20.0, help="of load around SIGTERM, which comes in its middle")
    parser.add_argument("--shutdown-timeout", type=float, default=30.0)
    args = parser.parse_args()
    result = asyncio.run(run(args))
    result["faults"] = faults(result) + result.pop("log_faults")
    result["passed"] = not result["faults"]
    for fault in result["faults"]:
        print("FAULT", fault)
    print(json.dumps({**result, "versions": versions(), "hardware": hardware()}))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
