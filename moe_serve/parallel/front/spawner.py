"""Spawner: starts the ranks of this machine and ends them. Knows processes; knows no messages."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping

from moe_serve.parallel.wire.environment import FRONT, SECRET, RankAddress


class Spawner:
    """The processes of one group; `start` replaces the group before it."""

    def __init__(self, num_ranks: int, threads_per_rank: int, environ: Mapping[str, str] = os.environ) -> None:
        self._num_ranks = num_ranks
        self._environ = {**environ, "OMP_NUM_THREADS": str(threads_per_rank)}
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def start(self, front: tuple[str, int], secret: str) -> None:
        """Start every rank; they say hello at `front`."""
        self.stop()
        port = _free_port()
        for rank in range(self._num_ranks):
            place = RankAddress(rank, self._num_ranks, rank, "127.0.0.1", port)
            environ = {**self._environ, **place.variables(), FRONT: f"{front[0]}:{front[1]}", SECRET: secret}
            # A session of its own: Ctrl-C ends the front, which drains and then ends the ranks.
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "moe_serve.parallel.ranks.rank"], env=environ, start_new_session=True
                )
            )

    def first_dead(self) -> tuple[int, int] | None:
        """(rank, exit status) of a rank whose process has ended; one that was killed before those it took along."""
        dead = [(p.returncode, rank) for rank, p in enumerate(self._processes) if p.poll() is not None]
        return (min(dead)[1], min(dead)[0]) if dead else None

    def stop(self) -> None:
        """End all at once: a rank may wait for another in a collective, or be stopped, and would not listen."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        self._processes = []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
