"""What HTTP costs beside the model: CPU time by thread at 64 concurrent streams, ours and others', interleaved.

    python benchmarks/bench_http.py [--model FOLDER] [--rounds 5]
        [--transformers PYTHON] [--llama-server BINARY --gguf FILE]

Every side is a server process of its own, all are up for the whole run, and each round loads one after the
other with the same client: 64 streams, one token per event. From /proc, the CPU time of the server's threads:

- http: uvicorn's event loop, which is the main thread, in ours and `transformers serve`; in llama-server, every
  thread but the main one and its OpenMP workers (the threads that used most).
- engine: all other threads.

CPU time rather than wall time, because it does not count what the machine does besides. Passed: our http is
below 10 % of our engine, in the median round. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from lean_client import Answer, ask
from measuring import hardware, versions
from soak_server import free_port

DEMO = Path(__file__).resolve().parents[1] / "moe_serve" / "demo" / "model"
LIMIT_FRAC = 0.10
START_S = 300.0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
SERVE = "import sys; from moe_serve.cli import main; sys.exit(main())"

ThreadTimes = dict[int, float]


@dataclass
class Side:
    """One server: how to start it, what to ask it, and which of its threads serve HTTP."""

    name: str
    command: list[str]
    ready_path: str
    path: str
    body: dict[str, Any]
    port: int
    http_threads: Callable[[int, ThreadTimes], set[int]]
    process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        log = Path(tempfile.mkdtemp(prefix="bench-http-")) / f"{self.name}.log"
        with log.open("w") as file:
            self.process = subprocess.Popen(self.command, stdout=file, stderr=file)
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"http://127.0.0.1:{self.port}{self.ready_path}", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.3)
        raise SystemExit(f"{self.name} did not start; see {log}")

    def thread_times(self) -> ThreadTimes:
        """CPU seconds of each thread so far."""
        times = {}
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            fields = (task / "stat").read_text().rsplit(") ", 1)[1].split()
            times[int(task.name)] = (int(fields[11]) + int(fields[12])) / TICKS_PER_S
        return times

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(timeout=90)


def main_thread(pid: int, used: ThreadTimes) -> set[int]:
    return {pid}


def all_but_busiest(count: int) -> Callable[[int, ThreadTimes], set[int]]:
    """llama-server computes on `count` threads, the main one among them."""

    def choose(pid: int, used: ThreadTimes) -> set[int]:
        busiest = sorted(used, key=lambda tid: used[tid], reverse=True)[:count]
        return set(used) - set(busiest)

    return choose


def sides(args: argparse.Namespace) -> list[Side]:
    threads = str(args.threads)
    text = {"prompt": "Once upon a time", "max_tokens": args.tokens, "temperature": 0, "stream": True}
    port = free_port()
    ours = [
        sys.executable,
        "-c",
        SERVE,
        "serve",
        args.model,
        "--no-supervisor",
        "--port",
        str(port),
        "--num-threads",
        threads,
    ]
    found = [Side("moe-serve", ours, "/health", "/v1/completions", {**text, "ignore_eos": True}, port, main_thread)]
    if args.transformers:
        port = free_port()
        command = [str(Path(args.transformers).with_name("transformers")), "serve", args.model, "--port", str(port)]
        command += ["--continuous-batching", "--device", "cpu"]
        body = {**text, "model": args.model}
        found.append(Side("transformers-serve", command, "/health", "/v1/completions", body, port, main_thread))
    if args.llama_server:
        port = free_port()
        command = [args.llama_server, "-m", args.gguf, "--port", str(port), "-t", threads, "-np", str(args.streams)]
        command += ["-c", str(args.streams * 256), "--no-warmup"]
        body = {**text, "prompt": [1000, 2000, 3000, 4000], "ignore_eos": True}
        found.append(
            Side("llama-server", command, "/health", "/v1/completions", body, port, all_but_busiest(args.threads))
        )
    return found


async def load(side: Side, streams: int) -> list[Answer]:
    jobs = (ask("127.0.0.1", side.port, side.path, side.body, True) for _ in range(streams))
    return list(await asyncio.gather(*jobs))


def measure(side: Side, streams: int) -> dict[str, float]:
    """One round: CPU microseconds per token, and what the clients saw."""
    before, start_s = side.thread_times(), time.monotonic()
    answers = asyncio.run(load(side, streams))
    wall_s, after = time.monotonic() - start_s, side.thread_times()
    used = {tid: after[tid] - before.get(tid, 0.0) for tid in after}
    tokens = sum(a.num_events for a in answers)
    if not tokens:
        raise SystemExit(f"{side.name} streamed nothing: {answers[0]}")
    http_s = sum(used[tid] for tid in side.http_threads(side.pid, used))
    engine_s = sum(used.values()) - http_s
    return {
        "tokens": tokens,
        "tokens_per_s": tokens / wall_s,
        "http_us_per_token": http_s / tokens * 1e6,
        "engine_us_per_token": engine_s / tokens * 1e6,
        "http_frac": http_s / engine_s,
        "ttft_p50_s": statistics.median(a.ttft_s for a in answers),
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    servers = sides(args)
    try:
        for side in servers:
            side.start()
            measure(side, args.streams)
        rounds: dict[str, list[dict[str, float]]] = {side.name: [] for side in servers}
        for _ in range(args.rounds):
            for side in servers:
                rounds[side.name].append(measure(side, args.streams))
                print(side.name, {k: round(v, 4) for k, v in rounds[side.name][-1].items()}, file=sys.stderr)
    finally:
        for side in servers:
            side.stop()
    return {name: _medians(found) for name, found in rounds.items()}


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(r[key] for r in rounds), 4) for key in rounds[0]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO), help="checkpoint folder; default: the demo model")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="per stream")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--transformers", help="python of an environment with transformers[serving]")
    parser.add_argument("--llama-server", help="llama-server's binary")
    parser.add_argument("--gguf", help="the same checkpoint for it")
    args = parser.parse_args()
    found = run(args)
    passed = found["moe-serve"]["http_frac"] < LIMIT_FRAC
    header = {"benchmark": "bench_http", "passed": passed, "model": args.model, "streams": args.streams}
    print(json.dumps({**header, "sides": found, "versions": versions(), "hardware": hardware()}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
