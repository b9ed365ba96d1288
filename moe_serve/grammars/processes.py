"""The server's side of the zygote: it is started when the first grammar comes, and forks a process for each.

Knows processes and their limits; knows no grammars and no sequences.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from moe_serve.errors import MoEServeError, OverloadedError
from moe_serve.grammars.wire import STILL_ENDING

START_S = 120.0
"""To import llguidance and to read a vocabulary; 150,000 tokens take 2 s."""
REPLY_BYTES = 64
END_PAUSE_S = 0.002
FORK_PAUSES_S = (0.05, 0.2, 0.8)
RETRY_AFTER_S = 10
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a grammar process must know of the tokenizer."""

    tokenizer: str
    """A tokenizer.json."""
    size: int
    eos: list[int]


class ZygoteGoneError(Exception):
    """The zygote has ended, and every grammar's process with it."""


class Zygote:
    """Forks processes and tells how they ended. Safe to call from any thread."""

    def __init__(self, vocabulary: Callable[[], Vocabulary]) -> None:
        """`vocabulary` is called at the first fork."""
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the zygote, if there is none yet. MoEServeError: it does not start."""
        with self._lock:
            self._connected()

    def fork(self, memory_bytes: int, cpu_s: int, is_idle: bool) -> tuple[int, socket.socket]:
        """A new process within limits: its id, and a socket to it. `is_idle`: it compiles when nothing else runs.

        MoEServeError: the zygote does not start. OverloadedError: the machine starts no more processes.
        """
        ours, its = socket.socketpair()
        with its:
            wanted = {"op": "fork", "memory_bytes": memory_bytes, "cpu_s": cpu_s, "is_idle": is_idle}
            message = json.dumps(wanted).encode()
            try:
                return self._forked(message, its.fileno()), ours
            except BaseException:
                ours.close()
                raise

    def end(self, pid: int, patience_s: float) -> int | None:
        """Kill a process, if it has not ended yet; its wait status (as os.waitpid tells it).

        None: it takes longer than `patience_s` to end.
        """
        message, deadline_s = json.dumps({"op": "end", "pid": pid}).encode(), time.monotonic() + patience_s
        try:
            while (status := self._ask(message)) == STILL_ENDING:
                if time.monotonic() > deadline_s:
                    return None
                time.sleep(END_PAUSE_S)
        except ZygoteGoneError:
            return int(signal.SIGKILL)
        return status

    def close(self) -> None:
        """End the zygote and all processes."""
        with self._lock:
            self._disconnect()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def _forked(self, message: bytes, fd: int) -> int:
        """A machine that is out of processes gets FORK_PAUSES_S to have one again."""
        for pause_s in (*FORK_PAUSES_S, None):
            pid = self._ask_twice(message, fd)
            if pid > 0:
                return pid
            if pause_s is not None:
                time.sleep(pause_s)
        reason = os.strerror(-pid)
        raise OverloadedError(f"no process can be started for a grammar: {reason}", retry_after_s=RETRY_AFTER_S)

    def _ask_twice(self, message: bytes, fd: int) -> int:
        """A zygote that has died since it was last used is replaced."""
        try:
            return self._ask(message, fd)
        except ZygoteGoneError:
            return self._ask(message, fd)

    def _ask(self, message: bytes, *fds: int) -> int:
        with self._lock:
            control = self._connected() if fds else self._control
            if control is None:
                raise ZygoteGoneError
            try:
                socket.send_fds(control, [message], fds)
                return int(_heard(control))
            except OSError as error:
                self._disconnect()
                raise ZygoteGoneError from error

    def _connected(self) -> socket.socket:
        if self._control is None:
            self._control, self._process = self._spawn()
            try:
                _heard(self._control, START_S)
            except OSError as error:
                self._disconnect()
                raise MoEServeError("the process that compiles grammars does not start") from error
        return self._control

    def _spawn(self) -> tuple[socket.socket, subprocess.Popen[bytes]]:
        ours, its = socket.socketpair(type=socket.SOCK_SEQPACKET)
        with its, _memory_file(self._vocabulary()) as file:
            fds = (its.fileno(), file.fileno())
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "moe_serve.grammars.compiler.zygote", *map(str, fds)],
                env=_environ(),
                stdin=subprocess.DEVNULL,
                pass_fds=fds,
                process_group=0,  # no session: Linux gives each session equal time, and niceness counts only within one
            )
        return ours, process

    def _disconnect(self) -> None:
        if self._control is not None and self._process is not None:
            self._control.close()
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._control = self._process = None


def _heard(control: socket.socket, timeout_s: float = 30.0) -> bytes:
    """The zygote's next message. OSError: it has gone, or says nothing."""
    control.settimeout(timeout_s)
    reply = control.recv(REPLY_BYTES)
    if not reply:
        raise ConnectionResetError
    return reply


def _memory_file(vocabulary: Vocabulary) -> BinaryIO:
    """JSON of the vocabulary, in a file without a name, to be read from its start."""
    file = os.fdopen(os.memfd_create("moe-serve-vocabulary"), "w+b")
    file.write(json.dumps(dataclasses.asdict(vocabulary)).encode())
    file.seek(0)
    return file


def _environ() -> dict[str, str]:
    """The zygote finds our package whatever its folder is; one malloc arena keeps its address space small."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "MALLOC_ARENA_MAX": "1"}
