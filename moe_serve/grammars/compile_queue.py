"""CompileQueue: which grammar is compiled when, so that slow ones hold up no quick one.

A grammar is tried for a moment first, then for seconds, then as long as it may; each level has slots of its own, and
a grammar that does not get done in its time is ended and starts again one level on. Within a level those that came
first, and small ones, go first. All of them run on time that others leave; one that gets next to none starts again at
a low priority. Knows processes; knows no requests.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from moe_serve.errors import MoEServeError
from moe_serve.grammars.allowance import Allowance, StarvedError, TooSlowError
from moe_serve.grammars.grammar_process import GrammarProcess, ProcessEndedError
from moe_serve.grammars.refusal import RefusedError
from moe_serve.scheduling.sequence import GrammarSpec

INFINITY = float("inf")
LEVELS = ((0.3, 1.5, 2), (2.0, 10.0, 1), (INFINITY, INFINITY, 1))
"""(CPU seconds of a try, seconds of it, slots), from level to level; the last is bounded by the limit for all."""
PATIENCE = 20
"""Seconds of the last try for each CPU second that it may take."""
CHARS_PER_S = 100_000
"""A text of this many characters gives way to texts that arrive up to a second after it."""


@dataclass(eq=False)
class Compilation:
    """A grammar on its way."""

    spec: GrammarSpec
    done: Callable[[GrammarProcess | Exception], None]
    """Called once at most, on a thread of the queue: the process, or what went wrong."""
    arrived_s: float = field(default_factory=time.monotonic)
    process: GrammarProcess | None = None
    is_idle: bool = True
    """It is compiled on the time that others leave."""
    is_unwanted: bool = False

    def kill(self) -> None:
        """End its process, if it has one."""
        if self.process is not None:
            self.process.kill()


class CompileQueue:
    """Compiles on threads of its own. Safe to call from any thread."""

    def __init__(self, fork: Callable[[bool], GrammarProcess], limit_s: float) -> None:
        """`fork` takes whether it compiles on idle time. `limit_s`: CPU seconds that compiling one grammar may take."""
        self._fork = fork
        self._limit_s = limit_s
        self._changed = threading.Condition()
        self._waiting: list[list[tuple[float, int, Compilation]]] = [[] for _ in LEVELS]
        self._numbers = itertools.count()
        self._threads: list[threading.Thread] = []
        self._running: set[Compilation] = set()
        self._is_closed = False

    @property
    def num_waiting(self) -> int:
        """Compilations that no slot has taken yet."""
        return sum(map(len, self._waiting))

    def submit(self, compilation: Compilation) -> None:
        """Queue it."""
        with self._changed:
            if not self._threads:
                self._start_threads()
            self._push(0, compilation)

    def drop(self, compilation: Compilation) -> None:
        """It is not wanted any more: ends its process, if it has one."""
        with self._changed:
            compilation.is_unwanted = True
            for queue in self._waiting:
                queue[:] = [entry for entry in queue if entry[2] is not compilation]
                heapq.heapify(queue)
            compilation.kill()

    def close(self) -> None:
        """End what is being compiled, and the threads."""
        with self._changed:
            self._is_closed = True
            left = [heapq.heappop(queue)[2] for queue in self._waiting for _ in range(len(queue))]
            for compilation in self._running:
                compilation.kill()
            self._changed.notify_all()
        for compilation in left:
            compilation.done(_shutting_down())
        for thread in self._threads:
            thread.join()

    def _start_threads(self) -> None:
        levels = [level for level, (*_, slots) in enumerate(LEVELS) for _ in range(slots)]
        self._threads = [
            threading.Thread(target=self._work, args=(level,), name=f"moe-serve-grammars-{level}", daemon=True)
            for level in levels
        ]
        for thread in self._threads:
            thread.start()

    def _push(self, level: int, compilation: Compilation) -> None:
        urgency = compilation.arrived_s + len(compilation.spec.text) / CHARS_PER_S
        heapq.heappush(self._waiting[level], (urgency, next(self._numbers), compilation))
        self._changed.notify_all()

    def _work(self, level: int) -> None:
        while (compilation := self._next(level)) is not None:
            outcome = self._try(compilation, level)
            with self._changed:
                self._running.discard(compilation)
            if outcome is not None:
                compilation.done(outcome)

    def _next(self, level: int) -> Compilation | None:
        with self._changed:
            while not self._waiting[level]:
                if self._is_closed:
                    return None
                self._changed.wait()
            return heapq.heappop(self._waiting[level])[2]

    def _try(self, compilation: Compilation, level: int) -> GrammarProcess | Exception | None:
        """The outcome; None if it goes on at the next level, or is not wanted any more."""
        try:
            process = self._fork(compilation.is_idle)
        except Exception as error:
            return error
        with self._changed:
            compilation.process = process
            self._running.add(compilation)
            if compilation.is_unwanted or self._is_closed:
                process.kill()
        try:
            process.compile(compilation.spec.kind.value, compilation.spec.text, self._allowance(compilation, level))
        except (TooSlowError, StarvedError) as error:
            process.close()
            return self._pass_on(compilation, level, error)
        except (RefusedError, ProcessEndedError) as error:
            process.close()
            return error
        return process

    def _allowance(self, compilation: Compilation, level: int) -> Allowance:
        cpu_s, wall_s, _ = LEVELS[level]
        if self._is_last(level):
            cpu_s, wall_s = self._limit_s, self._limit_s * PATIENCE
        return Allowance(cpu_s, wall_s, compilation.is_idle)

    def _is_last(self, level: int) -> bool:
        return LEVELS[level][0] >= self._limit_s

    def _pass_on(self, compilation: Compilation, level: int, error: TooSlowError | StarvedError) -> Exception | None:
        is_starved = isinstance(error, StarvedError)
        with self._changed:
            compilation.process = None
            if self._is_closed:
                return _shutting_down()
            if compilation.is_unwanted or (self._is_last(level) and not is_starved):
                return error
            compilation.is_idle = compilation.is_idle and not is_starved
            self._push(level if is_starved else level + 1, compilation)
        return None


def _shutting_down() -> MoEServeError:
    return MoEServeError("the engine is shutting down")
