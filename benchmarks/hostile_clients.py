"""200 hostile clients beside 8 ordinary ones: do the ordinary ones lose a request, or a fifth of their speed?

    python benchmarks/hostile_clients.py [--minutes 10]

Starts a server on the demo model. The ordinary clients stream alone, then beside the hostile ones, by turns, so that
both see the same machine. A hostile client sends slowly, reads slowly, closes half, sends a huge body, huge headers
or garbage, or leaves in the middle of compiling a grammar; then it starts again. The hostile ones share the machine
here, which those of a network do not: the cores that each side used are told, and `--hostile-nice 19` has their process
give way to the server's, as a machine of their own would. `per_server_cpu_ratio` compares tokens
per CPU second of the server, its grammars included; other work on the machine changes it little. /live is asked from a
process of its own, and so is a server that does nothing: what that takes is the machine's.

Passed: no ordinary request is lost, the ordinary ones keep 80 % of their speed, no hostile answer is a 5xx but 503, and
the server gives its memory back but 50 MB. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lean_client import End, ask
from measuring import hardware, rss_mb, versions
from soak_server import StartedServer

HOST = "127.0.0.1"
BODY = {"prompt": "Once upon a time", "max_tokens": 64, "ignore_eos": True, "stream": True}
KEPT_SPEED = 0.8
GROWTH_MB = 50.0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
SETTLE_S = 10.0
HEAD = "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n\r\n"
STATUS = re.compile(rb"^HTTP/1\.1 (\d{3})", re.MULTILINE)

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Deed = Callable[[asyncio.StreamReader, asyncio.StreamWriter, random.Random], Awaitable[bytes]]


@dataclass
class Ordinary:
    """What the ordinary clients got, in one kind of phase."""

    tokens: int = 0
    seconds: float = 0.0
    ends: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    cpu_s: dict[str, float] = field(default_factory=lambda: {"server": 0.0, "grammars": 0.0})
    """CPU time by side: the server, the processes of its grammars, the hostile clients."""

    @property
    def cores(self) -> dict[str, float]:
        """That each side used on average."""
        return {side: round(cpu_s / self.seconds, 3) for side, cpu_s in self.cpu_s.items()}

    @property
    def tokens_per_server_cpu_s(self) -> float:
        """What the ordinary clients got for the server's CPU time, its grammars' included: other processes of the
        machine change it little."""
        return self.tokens / max(self.cpu_s["server"] + self.cpu_s["grammars"], 1e-3)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def post(path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    return HEAD.format(path=path, size=len(content)).encode() + content


async def hear(reader: asyncio.StreamReader, seconds: float, pause_s: float = 0.0, size: int = 1 << 16) -> bytes:
    """What comes within a time."""
    heard = b""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while piece := await reader.read(size):
                heard += piece
                await asyncio.sleep(pause_s)
    return heard


async def write_slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rng: random.Random) -> bytes:
    for byte in post("/v1/completions", BODY)[: rng.randrange(20, 150)]:
        writer.write(bytes([byte]))
        await asyncio.sleep(0.1)
    return b""


async def read_slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rng: random.Random) -> bytes:
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50)
    return await hear(reader, 10, pause_s=0.2, size=512)


async def close_half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rng: random.Random) -> bytes:
    writer.write(post("/v1/completions", {"prompt": "x", "max_tokens": 2}))
    writer.write_eof()
    return await hear(reader, 10)


async def send_much(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rng: random.Random) -> bytes:
    content = b'{"prompt":"' + b"hello world " * rng.choice((20_000, 200_000)) + b'"}'
    writer.write(HEAD.format(path="/v1/completions", size=len(content)).encode() + content)
    await writer.drain()
    return await hear(reader, 10)


async def send_headers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rng: random.Random) -> bytes:
    writer.write(b"GET /live HTTP/1.1\r\nHost: localhost\r\n" + b"".join(b"h%d: x\r\n" % i for i in range(50_000)))
    await writer.drain()
    return await hear(reader, 10)


async def leave_a_grammar(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rng: random.Random) -> bytes:
    rules = "\n".join(f'r{i}: "x{rng.random()}" r{i + 1}' for i in range(3000))
    grammar = f'start: r0\n{rules}\nr3000: "y"'
    writer.write(post("/v1/completions", {"prompt": "x", "max_tokens": 4, "guided_grammar": grammar}))
    return await hear(reader, rng.random())


async def send_garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rng: random.Random) -> bytes:
    writer.write(rng.randbytes(rng.choice((10, 5000))) + b"\r\n\r\n")
    return await hear(reader, 5)


DEEDS: tuple[Deed, ...] = (
    *(write_slowly, read_slowly, close_half, send_much, send_headers),
    *(leave_a_grammar, send_garbage),
)


async def hostile(port: int, rng: random.Random, until_s: float, statuses: Counter[str]) -> None:
    """One hostile client: one deed after another."""
    while time.monotonic() < until_s:
        deed = rng.choice(DEEDS)
        with suppress(OSError):
            reader, writer = await asyncio.open_connection(HOST, port)
            try:
                heard = await deed(reader, writer, rng)
                statuses.update(f"{deed.__name__} {status.decode()}" for status in STATUS.findall(heard))
            finally:
                writer.transport.abort()
        await asyncio.sleep(0.05 + 0.1 * rng.random())


async def ordinary(port: int, until_s: float, into: Ordinary) -> None:
    """One ordinary client: streams one answer after another."""
    while time.monotonic() < until_s:
        answer = await ask(HOST, port, "/v1/completions", BODY)
        into.ends[answer.end] += 1
        into.tokens += answer.num_events
        if answer.end is not End.DONE:
            into.notes = [*into.notes, answer.note][:5]


def cpu_seconds(pid: int) -> dict[str, float]:
    """Of a server so far, and of its child processes with those of theirs that have ended."""
    used = {"server": _ticks(pid)[0] / TICKS_PER_S, "grammars": 0.0}
    waiting = _children(pid)
    while waiting:
        child = waiting.pop()
        with suppress(OSError):
            used["grammars"] += sum(_ticks(child)) / TICKS_PER_S
            waiting += _children(child)
    return used


def _ticks(pid: int) -> tuple[int, int]:
    """CPU time of a process, and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12]), int(fields[13]) + int(fields[14])


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, thread.read_text().split())
    return found


async def ordinary_phase(port: int, seconds: float, clients: int, into: Ordinary) -> None:
    start_s = time.monotonic()
    await asyncio.gather(*(ordinary(port, start_s + seconds, into) for _ in range(clients)))
    into.seconds += time.monotonic() - start_s


class Hostiles:
    """The hostile clients, in a process of their own: their work is not to slow the ordinary ones' clients."""

    def __init__(self, port: int, clients: int, seconds: float, seed: int, niceness: int) -> None:
        command = [
            "nice",
            "-n",
            str(niceness),
            sys.executable,
            __file__,
            "--hostile-part",
            str(port),
            str(clients),
            str(seconds),
            str(seed),
        ]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)

    def wait(self) -> tuple[Counter[str], float]:
        """Their answers, and their CPU time in seconds."""
        said, _ = self._process.communicate()
        answers, cpu_s = json.loads(said)
        return Counter(answers), cpu_s


async def hostile_part(port: int, clients: int, seconds: float, seed: int) -> Counter[str]:
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # a server that hangs up is what is wanted here
    until_s, statuses = time.monotonic() + seconds, Counter[str]()
    await asyncio.gather(*(hostile(port, random.Random(f"{seed}/{i}"), until_s, statuses) for i in range(clients)))
    return statuses


class Probes:
    """/live of the server, and a server that does nothing, asked in the same way."""

    def __init__(self, port: int) -> None:
        trivial = Path(__file__).with_name("trivial_server.py")
        self._trivial = subprocess.Popen([sys.executable, str(trivial)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._trivial.stdout is not None
        ports = {"live": port, "machine": int(self._trivial.stdout.readline())}
        self._probes = {name: self._start(port) for name, port in ports.items()}

    @staticmethod
    def _start(port: int) -> subprocess.Popen[bytes]:
        probe = Path(__file__).with_name("live_probe.py")
        return subprocess.Popen([sys.executable, str(probe), str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def wait(self) -> dict[str, Any]:
        """Their times, by name."""
        times = {name: json.loads(probe.communicate()[0]) for name, probe in self._probes.items()}
        self._trivial.communicate()
        return times


def counted_phase(pid: int, port: int, args: argparse.Namespace, into: Ordinary) -> None:
    before = cpu_seconds(pid)
    asyncio.run(ordinary_phase(port, args.phase_s, args.ordinary, into))
    for side, cpu_s in cpu_seconds(pid).items():
        into.cpu_s[side] += cpu_s - before[side]


def measure(args: argparse.Namespace, server: StartedServer) -> dict[str, Any]:
    """Phases by turns: alone, beside the hostile ones."""
    assert server.pid is not None
    port = int(server.url.rsplit(":", 1)[1])
    alone, beside, statuses = Ordinary(), Ordinary(), Counter[str]()
    asyncio.run(ordinary_phase(port, 5, args.ordinary, Ordinary()))  # memory is taken at first use
    before_mb = rss_mb(server.pid)["RssAnon"]
    probes = Probes(port)
    end_s, turn = time.monotonic() + args.minutes * 60, 0
    while time.monotonic() < end_s:
        counted_phase(server.pid, port, args, alone)
        hostiles = Hostiles(port, args.hostile, args.phase_s + 2, args.seed + turn, args.hostile_nice)
        counted_phase(server.pid, port, args, beside)
        answers, cpu_s = hostiles.wait()
        statuses += answers
        beside.cpu_s["hostile"] = beside.cpu_s.get("hostile", 0.0) + cpu_s
        turn += 1
    times = probes.wait()
    time.sleep(SETTLE_S)
    return {
        "alone": vars(alone) | {"tokens_per_s": round(alone.tokens_per_s, 1), "cores": alone.cores},
        "beside": vars(beside) | {"tokens_per_s": round(beside.tokens_per_s, 1), "cores": beside.cores},
        "speed_ratio": round(beside.tokens_per_s / alone.tokens_per_s, 3),
        "per_server_cpu_ratio": round(beside.tokens_per_server_cpu_s / alone.tokens_per_server_cpu_s, 3),
        "hostile_answers": dict(sorted(statuses.items())),
        **times,
        "rss_mb": {"before": round(before_mb, 1), "after": round(rss_mb(server.pid)["RssAnon"], 1)},
    }


def faults(found: dict[str, Any]) -> list[str]:
    told = []
    lost = {end: n for side in ("alone", "beside") for end, n in found[side]["ends"].items() if end != End.DONE}
    if lost:
        told.append(f"ordinary requests were lost: {lost}")
    if found["speed_ratio"] < KEPT_SPEED:
        told.append(f"ordinary clients keep {found['speed_ratio']:.0%} of their speed")
    errors = [answer for answer in found["hostile_answers"] if re.search(r" 5(?!03|05)", answer)]
    if errors:
        told.append(f"server errors: {errors}")
    if found["rss_mb"]["after"] > found["rss_mb"]["before"] + GROWTH_MB:
        told.append(f"memory grew: {found['rss_mb']}")
    return told


def main() -> int:
    if sys.argv[1:2] == ["--hostile-part"]:
        port, clients, seconds, seed = sys.argv[2:]
        answers = asyncio.run(hostile_part(int(port), int(clients), float(seconds), int(seed)))
        print(json.dumps([answers, sum(os.times()[:2])]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--phase-s", type=float, default=15.0, help="length of a turn")
    parser.add_argument("--hostile", type=int, default=200)
    parser.add_argument("--ordinary", type=int, default=8)
    parser.add_argument("--hostile-nice", type=int, default=0, help="niceness of the hostile clients' process")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    server = StartedServer(None, ["--kv-cache-mib", "64", "--read-timeout-s", "5"])
    try:
        found = measure(args, server)
        told = faults(found) + server.check()
    finally:
        server.stop()
    result = {
        "benchmark": "hostile_clients",
        "passed": not told,
        "faults": told,
        "minutes": args.minutes,
        "hostile_nice": args.hostile_nice,
        **found,
    }
    print(json.dumps(result | {"versions": versions(), "hardware": hardware()}))
    return 1 if told else 0


if __name__ == "__main__":
    sys.exit(main())
