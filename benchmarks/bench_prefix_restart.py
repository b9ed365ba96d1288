"""An agent's next turn after `kill -9`: time to first token with the prefix cache on disk, over that of a cold server.

    python benchmarks/make_checkpoint.py qwen3-moe-30m /tmp/qwen3-moe-30m --dtype bfloat16
    python benchmarks/bench_prefix_restart.py /tmp/qwen3-moe-30m --tokens 20000

A history of --tokens random tokens and a short answer are one turn; the next turn is these and 64 new tokens. Four
servers: one answers the first turn, is given time to write and is killed with SIGKILL. The second has its files. The
third has an empty folder: it is the cold one. A fourth finds one file damaged. The answers must be the same. The last
line is one JSON object; `ratio` is the time to first token of the second over that of the third.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from measuring import hardware, versions
from soak import read_gauges

NEW_TOKENS = 64
ANSWER_TOKENS = 16
WAIT_S = 600.0


@dataclass
class Server:
    """A child process that serves, and its log."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def answer(self, prompt: list[int]) -> dict[str, Any]:
        """Text of a greedy answer, seconds to its first token, and the usage."""
        body = {"prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
        body |= {"stream_options": {"include_usage": True}}
        start_s, first_s, text = time.monotonic(), 0.0, ""
        usage: dict[str, Any] = {}
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=WAIT_S) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                first_s = first_s or time.monotonic() - start_s
                event = json.loads(line.removeprefix("data: "))
                text += "".join(choice["text"] for choice in event["choices"])
                usage = event.get("usage") or usage
        return {"text": text, "ttft_s": first_s, "usage": usage}

    def wait_until_written(self) -> float:
        """Bytes on disk, once they have not changed for a second."""
        before = -1.0
        while True:
            written = read_gauges(self.url, ("prefix_disk_written_bytes_total",))["prefix_disk_written_bytes_total"]
            if written == before and written > 0:
                return written
            before = written
            time.sleep(1)


@contextmanager
def serving(model: str, folder: Path, tokens: int) -> Iterator[Server]:
    """A server with its prefixes in `folder`, killed at the end."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    pages = -(-(tokens + 1024) // 16) + 64
    flags = ["--prefix-cache-dir", str(folder), "--max-num-seqs", "4", "--num-kv-pages", str(pages), "--no-supervisor"]
    command = [sys.executable, "-m", "moe_serve", "serve", model, "--port", str(port), *flags]
    log = folder.with_suffix(".log")
    with log.open("ab") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
    server = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        _wait_until_ready(server)
        yield server
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def _wait_until_ready(server: Server) -> None:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        assert server.process.poll() is None, server.log.read_text()
        try:
            if httpx.get(f"{server.url}/health", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise TimeoutError(server.log.read_text())


def damage(folder: Path) -> None:
    """Flip a byte of one file."""
    files = sorted(folder.rglob("*.page"))
    content = bytearray(files[len(files) // 2].read_bytes())
    content[-1] ^= 1
    files[len(files) // 2].write_bytes(content)


def measure(model: str, tokens: int, work: Path) -> dict[str, Any]:
    """All servers, one after the other."""
    rng = random.Random(1)
    history = [rng.randrange(3, 4000) for _ in range(tokens)]
    turn = history + [rng.randrange(3, 4000) for _ in range(NEW_TOKENS)]
    warm, cold = work / "warm", work / "cold"
    with serving(model, warm, tokens) as server:
        first = server.answer(history)
        written = server.wait_until_written()
    with serving(model, warm, tokens) as server:
        after_restart = server.answer(turn)
    with serving(model, cold, tokens) as server:
        without = server.answer(turn)
    damage(warm)
    with serving(model, warm, tokens) as server:
        damaged = server.answer(turn)
    refusals = [line for line in (work / "warm.log").read_text().splitlines() if "is ignored" in line]
    assert after_restart["text"] == without["text"] == damaged["text"]
    return {
        "benchmark": "prefix_restart",
        "tokens": tokens,
        "first_turn_ttft_s": round(first["ttft_s"], 3),
        "cold_ttft_s": round(without["ttft_s"], 3),
        "restart_ttft_s": round(after_restart["ttft_s"], 3),
        "damaged_ttft_s": round(damaged["ttft_s"], 3),
        "ratio": round(after_restart["ttft_s"] / without["ttft_s"], 4),
        "usage": after_restart["usage"],
        "usage_damaged": damaged["usage"],
        "written_mib": round(written / (1 << 20), 1),
        "refusals_logged": len(refusals),
        "hardware": hardware(),
        "versions": versions(),
    }


def main() -> int:
    """0 if the ratio is at most --most."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=20000)
    parser.add_argument("--most", type=float, default=0.05)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="prefix-restart-"))
    try:
        result = measure(args.model, args.tokens, work)
    finally:
        shutil.rmtree(work)
    print(json.dumps(result))
    return 0 if result["ratio"] <= args.most else 1


if __name__ == "__main__":
    sys.exit(main())
