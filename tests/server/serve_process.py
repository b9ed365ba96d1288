"""`moe-serve serve` as a process of its own, with the demo model, and a client that streams from it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-c", "import sys; from moe_serve.cli import main; sys.exit(main())", "serve"]
KEY = {"Authorization": "Bearer sk-1"}
LONG = {"prompt": "Once", "max_tokens": 1500, "ignore_eos": True, "stream": True}


class Serve:
    """One server process, its log in a file."""

    def __init__(self, folder: Path, *flags: str, port: int | None = None, env: dict[str, str] | None = None) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = folder / f"{self.port}.log"
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_WAIT_POLICY": "passive", **(env or {})}
        with self._log.open("a") as log:
            command = [*COMMAND, "--port", str(self.port), "--kv-cache-mib", "64", *flags]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def health(self) -> str:
        """What /health says, or "" while nobody listens."""
        try:
            return str(httpx.get(f"{self.url}/health", timeout=PATIENCE_S).json()["status"])
        except httpx.TransportError:
            return ""

    def wait_until(self, condition: Callable[[], object], limit_s: float = PATIENCE_S) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, self.log
            assert self.process.poll() is None, self.log
            time.sleep(0.05)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self, limit_s: float = PATIENCE_S) -> int:
        return self.process.wait(limit_s)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(folder: Path) -> Iterator[Callable[..., Serve]]:
    """Starts servers with logs in `folder`, and ends them."""
    servers: list[Serve] = []

    def make(*flags: str, **settings: Any) -> Serve:
        servers.append(Serve(folder, *flags, **settings))
        return servers[-1]

    yield make
    for server in servers:
        server.process.kill()
        server.process.wait()


class Reader(threading.Thread):
    """Streams one long answer in the background and keeps its events."""

    def __init__(self, url: str, body: dict[str, Any] = LONG) -> None:
        super().__init__()
        self.events: list[str] = []
        self.broke_off = False
        self._url, self._body = url, body
        self.start()

    def run(self) -> None:
        try:
            with httpx.stream(
                "POST", f"{self._url}/v1/completions", json=self._body, headers=KEY, timeout=PATIENCE_S
            ) as response:
                self.events += (line[6:] for line in response.iter_lines() if line.startswith("data: "))
        except httpx.TransportError:
            self.broke_off = True


def child_of(server: Serve) -> int:
    """The process that serves, below the supervisor; 0 while there is none."""
    pid = server.process.pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    return int(children[0]) if children else 0


def complete(server: Serve) -> httpx.Response:
    """The answer to a short greedy request."""
    body = {"prompt": "Once", "max_tokens": 4, "temperature": 0}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=PATIENCE_S)
