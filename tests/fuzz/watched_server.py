"""A real server process under attack: it lives, answers /live from another process's view, and gives memory back."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.server.serve_process import ROOT, Serve, complete

MAY_GROW_MIB = 50
SETTLE_S = 30.0
WARM_UPS = 3
PROBE = ROOT / "benchmarks" / "live_probe.py"
TRIVIAL = ROOT / "benchmarks" / "trivial_server.py"


def _probe(port: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, str(PROBE), str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


class WatchedServer:
    """`moe-serve serve` on the demo model, and what is measured of it."""

    def __init__(self, server: Serve) -> None:
        self.server = server
        self.port = server.port
        self.url = server.url
        self._before_mib = self.resident_mib()
        self._trivial = subprocess.Popen([sys.executable, str(TRIVIAL)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._trivial.stdout is not None
        ports = {"live": self.port, "machine": int(self._trivial.stdout.readline())}
        self._probes = {name: _probe(port) for name, port in ports.items()}
        self._found: dict[str, Any] | None = None

    def resident_mib(self) -> float:
        pages = int(Path(f"/proc/{self.server.process.pid}/statm").read_text().split()[1])
        return pages * 4096 / 2**20

    def check(self) -> None:
        """AssertionError: it has ended, does not answer an ordinary request, or an error's trace is in its log."""
        assert self.server.process.poll() is None, f"the server has ended: {self.server.log[-2000:]}"
        answer = complete(self.server)
        assert answer.status_code == 200, answer.text
        start = self.server.log.find("Traceback")
        assert start < 0, self.server.log[max(start - 500, 0) : start + 4000]

    def report(self) -> dict[str, Any]:
        """Times of /live and of the machine, and memory, once the attack is over. Memory has SETTLE_S to come back.

        `machine` is a server that does nothing, asked in the same way at the same time: what it took is not ours.
        """
        self.check()
        if self._found is None:
            said = {name: json.loads(probe.communicate()[0]) for name, probe in self._probes.items()}
            deadline_s = time.monotonic() + SETTLE_S
            while self.resident_mib() > self._before_mib + MAY_GROW_MIB and time.monotonic() < deadline_s:
                time.sleep(0.5)
            grown = round(self.resident_mib() - self._before_mib, 1)
            self._found = said | {"grown_mib": grown}
        return self._found

    def end(self) -> None:
        for process in (*self._probes.values(), self._trivial):
            process.kill()
            process.communicate()
        self.server.process.kill()
        self.server.process.wait()


@contextmanager
def watched_server(*flags: str) -> Iterator[WatchedServer]:
    """One that has answered a few requests of each kind before its memory is looked at."""
    with tempfile.TemporaryDirectory() as folder:
        server = Serve(Path(folder), "--no-supervisor", *flags)
        try:
            server.wait_until(lambda: server.health() == "ready")
            for _ in range(WARM_UPS):
                complete(server)
                body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "guided_regex": "[a-z]+"}
                httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
            watched = WatchedServer(server)
        except BaseException:
            server.process.kill()
            raise
        try:
            yield watched
        finally:
            watched.end()
