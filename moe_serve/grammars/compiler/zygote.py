"""The zygote: a small process that has llguidance and the tokenizer loaded, and forks one process per grammar.

    python -m moe_serve.grammars.compiler.zygote CONTROL VOCABULARY

Both are inherited file descriptors: a SOCK_SEQPACKET socket, and a file of JSON. The server asks for a fork, which
takes milliseconds, or for the end of a process. When its socket closes, the zygote ends and takes all with it.
It has one thread, so that a fork is safe. Ctrl-C and SIGTERM go to the server, which still needs its grammars.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import selectors
import signal
import socket
import sys
from contextlib import suppress

from llguidance import LLTokenizer

from moe_serve.grammars.compiler import child, limits
from moe_serve.grammars.wire import STILL_ENDING

CONTROL_BYTES = 1 << 12
MAX_UNASKED = 1000
"""Ended processes whose status is kept for a server that may not ask."""


class Zygote:
    """Answers the server until it goes."""

    def __init__(self, control: socket.socket, tokenizer: LLTokenizer) -> None:
        self._control = control
        self._tokenizer = tokenizer
        self._running: set[int] = set()
        self._ended: dict[int, int] = {}
        """Wait status of processes that ended before the server asked for it."""

    def serve(self) -> None:
        """Return when the server has gone; no process is left then."""
        wake, woken = socket.socketpair()
        for end in (wake, woken):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake.fileno())
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ, self._answer)
            selector.register(woken, selectors.EVENT_READ, lambda: self._reap_all(woken))
            while all([key.data() for key, _ in selector.select()]):
                pass
        for pid in self._running:
            os.kill(pid, signal.SIGKILL)
        for pid in self._running:
            os.waitpid(pid, 0)

    def _answer(self) -> bool:
        message, fds, _, _ = socket.recv_fds(self._control, CONTROL_BYTES, 1)
        if not message:
            return False
        request = json.loads(message)
        reply = self._fork(request, fds[0]) if request["op"] == "fork" else self._end(request["pid"])
        with suppress(OSError):  # the next read tells that the server has gone
            self._control.send(str(reply).encode())
        return True

    def _fork(self, request: dict[str, int], fd: int) -> int:
        """The new process, or the negative errno of a machine that starts no more processes: the others go on."""
        try:
            pid = os.fork()
        except OSError as error:
            os.close(fd)
            return -(error.errno or errno.EAGAIN)
        if not pid:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._control.close()
            channel, memory_bytes, cpu_s = socket.socket(fileno=fd), request["memory_bytes"], request["cpu_s"]
            child.run(channel, self._tokenizer, memory_bytes, cpu_s, bool(request["is_idle"]))
        os.close(fd)
        self._running.add(pid)
        return pid

    def _end(self, pid: int) -> int:
        """Kill a process unless it has ended by itself; its wait status, or STILL_ENDING: to be asked again.

        A process on idle time may take a while to end on a busy machine; no other is to wait for that.
        """
        if pid in self._running:
            os.kill(pid, signal.SIGKILL)
            self._reap(pid)
        return STILL_ENDING if pid in self._running else self._ended.pop(pid, 0)

    def _reap_all(self, woken: socket.socket) -> bool:
        with suppress(BlockingIOError):
            woken.recv(CONTROL_BYTES)
        for pid in list(self._running):
            self._reap(pid)
        return True

    def _reap(self, pid: int) -> None:
        """Note how it ended, if it has."""
        found, status = os.waitpid(pid, os.WNOHANG)
        if not found:
            return
        self._running.remove(pid)
        self._ended[pid] = status
        if len(self._ended) > MAX_UNASKED:
            del self._ended[next(iter(self._ended))]


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    control_fd, vocabulary_fd = map(int, sys.argv[1:])
    with open(vocabulary_fd, encoding="utf-8") as file:
        vocabulary = json.load(file)
    tokenizer = LLTokenizer(vocabulary["tokenizer"], n_vocab=vocabulary["size"], eos_token=vocabulary["eos"])
    del vocabulary
    limits.no_core_dumps()
    gc.collect()
    gc.freeze()
    control = socket.socket(fileno=control_fd)
    control.send(b"ready")
    Zygote(control, tokenizer).serve()


if __name__ == "__main__":
    main()
