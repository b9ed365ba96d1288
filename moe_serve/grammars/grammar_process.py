"""GrammarProcess: one grammar's process as the server sees it. Compiles once, then gives masks, step by step.

Knows its socket and how it may end; knows no queue and no sequences.
"""

from __future__ import annotations

import itertools
import json
import select
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from moe_serve.grammars import wire
from moe_serve.grammars.allowance import Allowance, TooSlowError, cpu_seconds
from moe_serve.grammars.processes import Zygote
from moe_serve.grammars.refusal import RefusedError

STEP_S = 10.0
"""Masks take milliseconds; a process that needs this long for those that it was asked for is ended."""
CLOSE_S = 10.0
"""A process on idle time may need this long to end on a busy machine."""
STEP_CLOSE_S = 0.25
"""Longest that a step waits for the reason why a process has ended."""
ENDS = {
    signal.SIGSEGV: "it is nested too deeply",
    signal.SIGBUS: "it is nested too deeply",
    signal.SIGABRT: "it takes more than {mib} MiB",
    signal.SIGXCPU: "it takes longer than {s:g} s",
    signal.SIGKILL: "the system ended its process, which happens when memory is short",
}


class ProcessEndedError(Exception):
    """The process of a grammar has ended; the message says why."""

    def __init__(self, reason: str, is_grammars: bool = True) -> None:
        """`is_grammars`: the grammar's own size or depth ended it, not the machine or the server."""
        super().__init__(reason)
        self.is_grammars = is_grammars


class GrammarProcess:
    """One forked process. `begin` and `forget` from any thread; `ask` and `hear` from one at a time."""

    def __init__(self, zygote: Zygote, memory_mib: int, most_s: float, is_idle: bool) -> None:
        """Fork it. `most_s`: CPU seconds that compiling may take, whatever the caller does. `is_idle`: it compiles on
        the time that others leave."""
        self._zygote = zygote
        self._limits = {"mib": memory_mib, "s": most_s}
        self._pid, self._channel = zygote.fork(memory_mib << 20, int(most_s) + 1, is_idle)
        self._lock = threading.Lock()
        """Of the followers; never held while the process is asked."""
        self._ids = itertools.count()
        self._forgotten: deque[int] = deque()
        self._end: ProcessEndedError | None = None
        self._asked: list[int] = []
        """Matchers whose masks are on their way."""
        self.asked_s = 0.0
        """When it was asked last, by time.monotonic."""
        self.num_followers = 0
        """Sequences that follow this grammar now."""
        self.kib = 0
        """Memory of its own, at most so far."""

    @property
    def pid(self) -> int:
        return self._pid

    def compile(self, kind: str, text: str, allowance: Allowance) -> None:
        """RefusedError, ProcessEndedError, TooSlowError or StarvedError; the caller ends the process then."""
        try:
            self._channel.settimeout(allowance.wall_s)
            wire.send(self._channel, json.dumps({"kind": kind, "text": text}).encode())
            self._await_verdict(allowance)
            answer = wire.receive(self._channel, time.monotonic() + STEP_S)
        except TimeoutError as error:
            raise TooSlowError(is_busy=True) from error
        except (EOFError, OSError) as error:
            raise self.close() from error
        refused, self.kib = wire.unpack_words(answer[: 2 * wire.WORD_BYTES])
        if refused:
            raise RefusedError(answer[2 * wire.WORD_BYTES :].decode(errors="replace"))

    def _await_verdict(self, allowance: Allowance) -> None:
        """Return when there is something to hear."""
        coming = select.poll()
        coming.register(self._channel, select.POLLIN)
        start_s, base_s = time.monotonic(), cpu_seconds(self._pid)
        while not coming.poll(1000 * allowance.pause_s(cpu_seconds(self._pid) - base_s, time.monotonic() - start_s)):
            pass

    def begin(self) -> int:
        """A matcher's number; it begins with the first step that names it."""
        with self._lock:
            self.num_followers += 1
            return next(self._ids)

    def forget(self, matcher: int) -> None:
        """The matcher is not used any more."""
        with self._lock:
            self.num_followers -= 1
            self._forgotten.append(matcher)

    def is_alive(self) -> bool:
        """Whether it can be asked; it may have ended by itself since it last was."""
        if self._end is not None:
            return False
        hung_up = select.poll()
        hung_up.register(self._channel, 0)  # POLLHUP is told whatever is asked for
        return not hung_up.poll(0)

    @property
    def asked(self) -> Sequence[int]:
        """Matchers whose masks are on their way; until they are heard, it must not be asked again."""
        return self._asked

    def ask(self, rows: Sequence[tuple[int, Sequence[int]]], num_words: int) -> None:
        """Have it compute the masks of `rows` (see wire.Step). ProcessEndedError: it has ended."""
        assert not self._asked, "what was asked before was not heard"
        forgotten = [self._forgotten.popleft() for _ in range(len(self._forgotten))]
        self._require_alive()
        try:
            self._channel.settimeout(STEP_S)
            wire.send(self._channel, wire.Step(num_words, rows, forgotten).pack())
        except OSError as error:
            raise self.close(STEP_CLOSE_S) from error
        self._asked, self.asked_s = [matcher for matcher, _ in rows], time.monotonic()

    def has_answered(self, wait_s: float) -> bool:
        """Whether `hear` need not wait. ProcessEndedError: it has taken too long."""
        self._require_alive()
        coming = select.poll()
        coming.register(self._channel, select.POLLIN)
        if coming.poll(max(wait_s, 0) * 1000):
            return True
        if time.monotonic() - self.asked_s > STEP_S:
            self._end_slow()
        return False

    def hear(self, masks: NDArray[np.int32]) -> dict[int, str]:
        """Write what was asked for into `masks` [rows, words]; errors by row, whose masks mean nothing."""
        self._require_alive()
        deadline_s = self.asked_s + STEP_S
        self._asked = []
        try:
            head = bytearray((1 + len(masks)) * wire.WORD_BYTES)
            wire.receive_into(self._channel, memoryview(head), deadline_s)
            self.kib, *lengths = wire.unpack_words(head)
            return self._read_rows(masks, lengths, deadline_s)
        except TimeoutError:
            self._end_slow()
            raise
        except (EOFError, OSError) as error:
            raise self.close(STEP_CLOSE_S) from error

    def _end_slow(self) -> None:
        self.close(STEP_CLOSE_S)
        self._end = ProcessEndedError(f"a token's mask took longer than {STEP_S:g} s")
        raise self._end

    def _read_rows(self, masks: NDArray[np.int32], lengths: Sequence[int], deadline_s: float) -> dict[int, str]:
        if not any(lengths):
            wire.receive_into(self._channel, masks.data.cast("B"), deadline_s)
            return {}
        errors = {}
        for row, length in enumerate(lengths):
            if length:
                text = bytearray(length)
                wire.receive_into(self._channel, memoryview(text), deadline_s)
                errors[row] = text.decode(errors="replace")
            else:
                wire.receive_into(self._channel, masks[row].data.cast("B"), deadline_s)
        return errors

    def _require_alive(self) -> None:
        if self._end is not None:
            raise self._end.with_traceback(None)

    def kill(self) -> None:
        """End it while another thread waits for its answer; that thread gets ProcessEndedError."""
        with suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)

    def close(self, patience_s: float = CLOSE_S) -> ProcessEndedError:
        """End it, if it has not ended by itself; why it ended, so far as that is known within `patience_s`."""
        if self._end is None:
            self._end = ProcessEndedError("it was closed", is_grammars=False)
            self._channel.close()
            self._end = self._reason(self._zygote.end(self._pid, patience_s))
        return self._end

    def _reason(self, status: int | None) -> ProcessEndedError:
        if status is None:
            return ProcessEndedError("its process was ended", is_grammars=False)
        number = status & 0x7F
        if not number:
            return ProcessEndedError(f"its process ended with status {status >> 8}")
        known = signal.Signals(number)
        text = ENDS.get(known, "its process was ended").format(**self._limits)
        return ProcessEndedError(f"{text} ({known.name})", known is not signal.SIGKILL)
