"""Strangers at a real server's ranks: garbage while it starts, silence while a lost rank comes back, nothing to reach.

Also the predictor's file on its whole way, because starting ranks is what takes time.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moe_serve import LLM
from moe_serve.cli import main
from moe_serve.parallel.front.engine import ParallelEngine
from moe_serve.parallel.front.token_uses import load_uses

from .references import Reference
from .serving import GREEDY, SMALL_ENGINE, tokens
from .test_parallel import ROOT, free_port

Checkpoint = Callable[[str], Path]
References = Callable[[str], Reference]

HELLO_OF_OLD = json.dumps({"op": "hello", "secret": "é", "rank": 0, "pid": 1}).encode()
GARBAGE = (
    struct.pack("!I", len(HELLO_OF_OLD)) + HELLO_OF_OLD,
    struct.pack("!I", 200_000) + b"[" * 200_000,
    struct.pack("!I", 1 << 30) + b"x" * 4096,
    b"GET / HTTP/1.1\r\n\r\n",
)
LISTENING = "0A"
LOOPBACK = "0100007F"
"""127.0.0.1 as /proc/net/tcp writes it."""


@pytest.fixture(autouse=True)
def _ranks_find_this_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'kernels'}")


class Nuisance(threading.Thread):
    """Says garbage at a port, again and again, and keeps some connections open."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.address = "127.0.0.1", port
        self.calls = 0
        self._is_over = threading.Event()

    def run(self) -> None:
        while not self._is_over.is_set():
            with contextlib.suppress(OSError), socket.create_connection(self.address, timeout=5) as stranger:
                stranger.sendall(GARBAGE[self.calls % len(GARBAGE)])
                self.calls += 1
                stranger.recv(100)
            time.sleep(0.02)

    def end(self) -> None:
        self._is_over.set()
        self.join()


def listeners_of(pid: int) -> Iterator[str]:
    """The address of each TCP socket at which a process listens, in hexadecimal."""
    sockets = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            sockets.update(re.findall(r"socket:\[(\d+)\]", os.readlink(entry)))
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING and fields[9] in sockets:
                yield fields[1].split(":")[0]


@pytest.mark.timeout(400)
@pytest.mark.slow
def test_strangers_change_nothing(checkpoint: Checkpoint, reference: References, tmp_path: Path) -> None:
    ref, folder = reference("mixtral"), checkpoint("mixtral")
    uses = make_uses(folder, tmp_path)
    nuisance = Nuisance(free_port())
    nuisance.start()
    llm = LLM(
        str(folder),
        **{**SMALL_ENGINE, "devices": 2, "rank_start_s": 120.0, "rank_port": nuisance.address[1], "ep_predictor": uses},
    )
    try:
        engine = llm.engine
        assert isinstance(engine, ParallelEngine)
        assert nuisance.calls > len(GARBAGE)
        assert tokens(llm.generate(ref.prompts, GREEDY)) == ref.outputs
        ranks = engine.team.describe()["ranks"]
        for pid in (os.getpid(), *(rank["pid"] for rank in ranks)):
            assert set(listeners_of(pid)) <= {LOOPBACK}
        assert list(listeners_of(ranks[0]["pid"]))  # gloo
        silent = [socket.create_connection(nuisance.address) for _ in range(20)]
        os.kill(ranks[1]["pid"], signal.SIGKILL)
        start = time.monotonic()
        while engine.team.generation == 1:
            time.sleep(0.1)
            assert time.monotonic() - start < 120, engine.team.describe()
        assert tokens(llm.generate(ref.prompts, GREEDY)) == ref.outputs
        for stranger in silent:
            stranger.close()
    finally:
        nuisance.end()
        llm.close()


def make_uses(folder: Path, tmp_path: Path) -> str:
    """As docs/distributed.md says: a trace, and from it the table."""
    prompts, trace, uses = (tmp_path / name for name in ("prompts.txt", "trace.npz", "uses.npz"))
    prompts.write_text("one prompt\nand another\n")
    limits = ["--max-tokens", "4", "--max-model-len", "64", "--num-kv-pages", "32", "--dtype", "float32"]
    assert main(["trace", str(folder), "--prompts", str(prompts), "--output", str(trace), *limits]) == 0
    assert main(["predictor", "tokens", str(trace), "--output", str(uses)]) == 0
    assert len(load_uses(str(uses)).token_ids) > 1
    return str(uses)
