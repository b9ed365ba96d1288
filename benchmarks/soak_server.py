"""The servers soak.py can put under load: one started for it, one in its own process, one elsewhere.

Each has `url`, `pid` (None when it runs on another machine), `check()` after the load, and `stop()`.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx

START_S = 300.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(url: str, timeout_s: float = START_S) -> None:
    """Return when /health answers 200; TimeoutError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise TimeoutError(f"{url}/health did not answer within {timeout_s:.0f} s")


class RemoteServer:
    """Somebody else's server; its memory is measured if it runs on this machine and `pid` is given."""

    def __init__(self, url: str, pid: int | None) -> None:
        self.url = url.rstrip("/")
        self.pid = pid
        wait_until_ready(self.url, 10)

    def check(self) -> list[str]:
        return []

    def stop(self) -> None:
        """It is not ours to stop."""


class StartedServer:
    """`moe-serve serve` as a child process, its log in a file."""

    def __init__(self, model: str | None, flags: list[str]) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = Path(tempfile.mkdtemp(prefix="moe-serve-soak-")) / "server.log"
        command = [
            str(Path(sys.executable).with_name("moe-serve")),
            "serve",
            "--no-supervisor",
            *([model] if model else []),
        ]
        with self.log.open("w") as log:
            self._process = subprocess.Popen([*command, "--port", str(port), *flags], stdout=log, stderr=log)
        self.pid: int | None = self._process.pid
        wait_until_ready(self.url)

    def check(self) -> list[str]:
        """Faults the log tells of."""
        text = self.log.read_text(errors="replace")
        faults = [f"{text.count('Traceback')} tracebacks in {self.log}"] if "Traceback" in text else []
        if self._process.poll() is not None:
            faults.append(f"the server ended with {self._process.returncode}; see {self.log}")
        return faults

    def stop(self) -> None:
        self._process.terminate()
        self.wait()

    def wait(self) -> int:
        """Exit status, once it has ended."""
        return self._process.wait(timeout=90)


class ErrorCount(logging.Handler):
    """Counts what the server logs as errors, and keeps the first few."""

    def __init__(self) -> None:
        super().__init__(level=logging.ERROR)
        self.count = 0
        self.first: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1
        if len(self.first) < 3:
            cause = record.exc_info[1] if record.exc_info else None
            self.first.append(f"{record.getMessage().strip()} {cause!r}")


class InProcessServer:
    """The server on a thread of this process, so that its page pool can be examined afterwards."""

    def __init__(self, model: str, settings: dict[str, Any]) -> None:
        import uvicorn

        from moe_serve.config import EngineConfig
        from moe_serve.engine.async_engine import AsyncEngine
        from moe_serve.engine.engine import Engine
        from moe_serve.server.app import create_app

        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.pid: int | None = os.getpid()
        self.engine = Engine.from_config(EngineConfig.from_dict({"model": model, **settings}))
        self._errors = ErrorCount()
        for name in ("", "uvicorn.error"):  # uvicorn's own loggers do not propagate
            logging.getLogger(name).addHandler(self._errors)
        app = create_app(AsyncEngine(self.engine), self.engine.tokenizer, model_name="soak", model_path=model)
        self._server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", access_log=False))
        self._thread = threading.Thread(target=self._server.run, name="soak-server", daemon=True)
        self._thread.start()
        wait_until_ready(self.url)

    def check(self) -> list[str]:
        """Pages, sequences and detokenisers must agree, and nothing may be left. Call when idle."""
        faults = [f"{self._errors.count} errors logged, first {self._errors.first}"] if self._errors.count else []
        try:
            self.engine.check_integrity()
        except AssertionError as error:
            faults.append(f"check_integrity: {error}")
        held = self.engine.pool.num_pages - self.engine.pool.num_free
        return [*faults, f"{held} pages are still held"] if held else faults

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=60)
