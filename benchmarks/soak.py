"""64 concurrent clients for five minutes, a third of them rude: does anything leak, stick or fail?

    python benchmarks/soak.py [--minutes 5] [--in-process | --url http://host:port [--pid PID]]

Clients stream and do not, chat and complete, ask for one to four samples with and without stop
strings; 15 % hang up in mid-stream and 15 % leave mostly before the first token; 4 % send rubbish.
Passed, if afterwards: no request ran longer than two minutes or broke off; no answer was a 5xx
other than a 503 with Retry-After; within 10 s /metrics shows nothing running, nothing waiting and
no KV page in use; the server's memory does not climb after the warm-up; and, with --in-process,
PagePool.check_integrity holds. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from measuring import hardware, rss_mb, versions
from soak_server import InProcessServer, RemoteServer, StartedServer

DEMO = Path(__file__).resolve().parents[1] / "moe_serve" / "demo" / "model"
IDLE_GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
SETTLE_S = 10.0
SAMPLE_S = 1.0
WARM_UP = 0.4
"""Fraction of the run after which memory must be flat: prefix cache, kernels and buffers have grown by then."""
GROWTH_LIMIT_MB = 20.0
"""What the fitted line may climb from the end of the warm-up to the end of the run."""


class MemoryLog(threading.Thread):
    """RssAnon of the server, once a second, in MB."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.samples: list[tuple[float, float]] = []
        self._pid = pid
        self._start_s = time.monotonic()
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(SAMPLE_S):
            self.samples.append((time.monotonic() - self._start_s, rss_mb(self._pid)["RssAnon"]))

    def stop(self) -> None:
        self._done.set()
        self.join()


def growth(samples: list[tuple[float, float]]) -> dict[str, float]:
    """Least-squares slope of memory after the warm-up, and what it climbs over that time."""
    start = samples[-1][0] * WARM_UP
    late = [s for s in samples if s[0] >= start]
    mean_t = sum(t for t, _ in late) / len(late)
    mean_mb = sum(mb for _, mb in late) / len(late)
    spread = sum((t - mean_t) ** 2 for t, _ in late)
    slope = sum((t - mean_t) * (mb - mean_mb) for t, mb in late) / spread if spread else 0.0
    return {
        "warm_up_s": round(start, 1),
        "first_mb": round(samples[0][1], 1),
        "after_warm_up_mb": round(late[0][1], 1),
        "last_mb": round(late[-1][1], 1),
        "peak_mb": round(max(mb for _, mb in samples), 1),
        "slope_mb_per_min": round(slope * 60, 3),
        "climb_mb": round(slope * (late[-1][0] - late[0][0]), 2),
    }


def read_gauges(url: str, names: tuple[str, ...] = IDLE_GAUGES) -> dict[str, float]:
    """Values in /metrics; by default the gauges that must be zero on an idle server."""
    found = {}
    for line in httpx.get(f"{url}/metrics", timeout=10).text.splitlines():
        name = line.split("{")[0].removeprefix("moe_serve:")
        if name in names and not line.startswith("#"):
            found[name] = float(line.rsplit(" ", 1)[1])
    return found


def wait_until_idle(url: str) -> tuple[float, dict[str, float]]:
    """Seconds until all gauges are zero (at most SETTLE_S), and their values then."""
    start = time.monotonic()
    while True:
        gauges = read_gauges(url)
        waited = time.monotonic() - start
        if (set(gauges) == set(IDLE_GAUGES) and not any(gauges.values())) or waited > SETTLE_S:
            return waited, gauges
        time.sleep(0.2)


def lone_hang_up(url: str) -> None:
    """One long request on an otherwise idle server, left in mid-stream: no later step tidies up after it."""
    body = {"prompt": "Once", "max_tokens": 1000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        for _ in range(10):
            next(lines)


def run_clients(url: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run soak_clients.py; returns its tally."""
    script = Path(__file__).with_name("soak_clients.py")
    options = ["--clients", args.clients, "--minutes", args.minutes, "--seed", args.seed]
    command = [sys.executable, str(script), "--url", url, *map(str, options)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    tally: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return tally


def soak(server: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Load, wait until idle, examine; returns the JSON line."""
    memory = MemoryLog(server.pid) if server.pid is not None else None
    if memory is not None:
        memory.start()
    tally = run_clients(server.url, args)
    idle_after_s, gauges = wait_until_idle(server.url)
    lone_hang_up(server.url)
    lone_idle_after_s, lone_gauges = wait_until_idle(server.url)
    if memory is not None:
        memory.stop()
    climb = growth(memory.samples) if memory is not None else None
    faults = list(tally["faults"]) + server.check() + _verdicts(tally, climb)
    faults += _not_idle("the last client", gauges) + _not_idle("a lone client hung up", lone_gauges)
    return {
        "benchmark": "soak",
        "passed": not faults,
        "faults": faults,
        "clients": args.clients,
        "minutes": args.minutes,
        "requests": sum(tally["outcomes"].values()),
        "outcomes": tally["outcomes"],
        "statuses": tally["statuses"],
        "output_events": tally["output_events"],
        "preemptions": read_gauges(server.url, ("num_preemptions_total",)),
        "idle_after_s": round(idle_after_s, 2),
        "lone_idle_after_s": round(lone_idle_after_s, 2),
        "gauges": gauges,
        "lone_gauges": lone_gauges,
        "memory": climb,
        "versions": versions(),
        "hardware": hardware(),
    }


def _not_idle(event: str, gauges: dict[str, float]) -> list[str]:
    is_idle = set(gauges) == set(IDLE_GAUGES) and not any(gauges.values())
    return [] if is_idle else [f"not idle {SETTLE_S:.0f} s after {event}: {gauges}"]


def _verdicts(tally: dict[str, Any], climb: dict[str, float] | None) -> list[str]:
    faults = []
    errors = {s: n for s, n in tally["statuses"].items() if int(s) >= 500 and int(s) != 503}
    if errors:
        faults.append(f"server errors by status: {errors}")
    if climb is not None and climb["climb_mb"] > GROWTH_LIMIT_MB:
        faults.append(f"memory climbs {climb['slope_mb_per_min']} MB per minute after the warm-up")
    return faults


def make_server(args: argparse.Namespace) -> Any:
    if args.url:
        return RemoteServer(args.url, args.pid)
    if args.in_process:
        settings = {"max_num_seqs": args.max_num_seqs, "num_kv_pages": args.num_kv_pages}
        return InProcessServer(args.model or str(DEMO), settings)
    flags = ["--max-num-seqs", args.max_num_seqs, "--num-kv-pages", args.num_kv_pages]
    return StartedServer(args.model, [str(f) for f in flags])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--model", help="checkpoint folder; default: the demo model")
    parser.add_argument("--max-num-seqs", type=int, default=32, help="below the clients, so that requests queue")
    parser.add_argument(
        "--num-kv-pages",
        type=int,
        default=192,
        help="few enough that all are touched during the warm-up (memory is taken at first use) and some preempted",
    )
    parser.add_argument("--in-process", action="store_true", help="serve from this process and check its page pool")
    parser.add_argument("--url", help="a server that is already running")
    parser.add_argument("--pid", type=int, help="its process id, to watch its memory")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    server = make_server(args)
    try:
        result = soak(server, args)
    finally:
        server.stop()
    for fault in result["faults"]:
        print("FAULT", fault)
    print(json.dumps(result))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
