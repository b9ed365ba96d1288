"""Spawner: starts the ranks of this machine and ends them. Knows processes; knows no messages."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from moe_serve.parallel.wire.environment import FRONT, SECRET, STORE, RankAddress


class Spawner:
    """The processes of one group; `start` replaces the group before it."""

    def __init__(self, num_ranks: int, threads_per_rank: int) -> None:
        self._num_ranks = num_ranks
        self._environ = {**os.environ, "OMP_NUM_THREADS": str(threads_per_rank)}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def start(self, front: tuple[str, int], secret: str) -> None:
        """Start every rank; they say hello at `front`."""
        self.stop()
        self._folder = tempfile.TemporaryDirectory(prefix="moe-serve-ranks-")
        own = {FRONT: f"{front[0]}:{front[1]}", SECRET: secret, STORE: str(Path(self._folder.name, "store"))}
        for rank in range(self._num_ranks):
            place = RankAddress(rank, self._num_ranks, rank, *front)
            # A session of its own: Ctrl-C ends the front, which drains and then ends the ranks.
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "moe_serve.parallel.ranks.rank"],
                    env={**self._environ, **place.variables(), **own},
                    start_new_session=True,
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
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
