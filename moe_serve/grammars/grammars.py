"""Grammars: what clients want their answers to look like, compiled and followed in processes that may die of it.

Each distinct grammar has a process of its own, kept while sequences follow it and a while longer. Knows
GrammarSpecs, processes and verdicts; knows no logits and no HTTP.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from moe_serve.errors import InvalidRequestError, MoEServeError, OverloadedError
from moe_serve.grammars.allowance import TooSlowError
from moe_serve.grammars.compile_queue import Compilation, CompileQueue
from moe_serve.grammars.grammar_process import GrammarProcess, ProcessEndedError
from moe_serve.grammars.matcher import Matcher, Place
from moe_serve.grammars.processes import Vocabulary, Zygote
from moe_serve.grammars.refusal import RefusedError
from moe_serve.scheduling.sequence import GrammarSpec
from moe_serve.text.tokenizer import Tokenizer

MAX_IDLE = 32
"""Processes that are kept although nothing follows their grammar now."""
MAX_HELD = 256
"""Processes up to which a request that waits for its first step holds one already."""
MAX_WAITING = 256
"""Grammars of new requests that may wait to be compiled."""
MAX_KNOWN = 4096
"""Verdicts that are remembered."""
MAX_CHARS = 4 << 20
TOTAL_PROCESSES = 4
"""All processes together may take as much memory as this many processes at their limit."""

Key = bytes
Verdict = str | None
"""What is wrong with a grammar; None if it can be followed."""


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """What one grammar may take."""

    compile_s: float = 10.0
    """CPU time, in seconds."""
    process_mib: int = 1024


@dataclass(eq=False)
class _Job:
    """A grammar being compiled and those who wait for it."""

    key: Key
    compilation: Compilation
    waiters: list[tuple[Future[Place], GrammarSpec, bool]] = field(default_factory=list)
    """(future, its grammar, whether it begins to follow)."""


class Grammars:
    """The grammars of one engine's tokenizer. Safe to call from any thread."""

    def __init__(
        self, vocabulary: Callable[[], Vocabulary], has_end: bool = True, limits: GrammarLimits | None = None
    ) -> None:
        """`vocabulary` is called when the first grammar comes, on another thread. `has_end`: it has an end token."""
        self._limits = limits or GrammarLimits()
        self._has_end = has_end
        self.zygote = Zygote(vocabulary)
        self._queue = CompileQueue(self._fork, self._limits.compile_s)
        self._lock = threading.Lock()
        """Of the three tables, held for moments."""
        self._verdicts: OrderedDict[Key, Verdict] = OrderedDict()
        self._alive: OrderedDict[Key, GrammarProcess] = OrderedDict()
        self._jobs: dict[Key, _Job] = {}

    @staticmethod
    def of(
        tokenizer: Tokenizer, vocab_size: int, eos_token_ids: frozenset[int], limits: GrammarLimits | None = None
    ) -> Grammars:
        """Grammars of a tokenizer, for a model that may sample the ids below `vocab_size`."""
        make = functools.partial(vocabulary_of, tokenizer, vocab_size, eos_token_ids)
        return Grammars(make, bool(eos_token_ids), limits)

    def begin_check(self, spec: GrammarSpec) -> Future[Place] | None:
        """Begin to compile; None if the grammar is known to be good. InvalidRequestError if it is known to be bad.

        The future ends with the errors of `check`. Cancelling it ends the compilation, unless others want it too.
        """
        key = self._key(spec)
        with self._lock:
            if key in self._verdicts:
                self._verdicts.move_to_end(key)
                if (wrong := self._verdicts[key]) is not None:
                    raise _refusal(spec, wrong)
                return None
        if self._queue.num_waiting >= MAX_WAITING:
            raise OverloadedError("too many grammars are waiting to be compiled", retry_after_s=10)
        return self._want(key, spec, begins=False)

    def check(self, spec: GrammarSpec) -> None:
        """Compile. InvalidRequestError names spec.param and says what is wrong; OverloadedError: too many at once."""
        if (pending := self.begin_check(spec)) is not None:
            pending.result()

    def start(self, spec: GrammarSpec) -> Matcher:
        """The grammar before its first token. Its process is taken now if there is one; else the first mask waits."""
        key = self._key(spec)
        with self._lock:
            process = self._alive_process(key)
            may_hold = process is not None and len(self._alive) <= MAX_HELD
            place = _place(process, True) if process is not None and may_hold else None
        return Matcher(lambda: self._want(key, spec, begins=True), place)

    def close(self) -> None:
        """End all processes; sequences that follow a grammar get an error in their next step."""
        self._queue.close()
        with self._lock:
            processes, self._alive = list(self._alive.values()), OrderedDict()
        for process in processes:
            process.close()
        self.zygote.close()

    def _fork(self, is_idle: bool) -> GrammarProcess:
        return GrammarProcess(self.zygote, self._limits.process_mib, self._limits.compile_s, is_idle)

    def _key(self, spec: GrammarSpec) -> Key:
        if not self._has_end:
            raise InvalidRequestError(spec.param, f"{spec.param}: this model has no end token to stop at")
        if len(spec.text) > MAX_CHARS:
            raise _refusal(spec, f"it has {len(spec.text)} characters; at most {MAX_CHARS} are compiled")
        return spec.kind.encode() + hashlib.sha256(spec.text.encode(errors="surrogatepass")).digest()

    def _want(self, key: Key, spec: GrammarSpec, begins: bool) -> Future[Place]:
        future: Future[Place] = Future()
        with self._lock:
            process = self._alive_process(key)
            if process is not None:
                future.set_result(_place(process, begins))
                return future
            job = self._jobs.get(key) or self._new_job(key, spec)
            job.waiters.append((future, spec, begins))
        future.add_done_callback(lambda done: self._leave(job, done))
        return future

    def _new_job(self, key: Key, spec: GrammarSpec) -> _Job:
        job = self._jobs[key] = _Job(key, Compilation(spec, lambda outcome: self._finish(job, outcome)))
        self._queue.submit(job.compilation)
        return job

    def _alive_process(self, key: Key) -> GrammarProcess | None:
        """The process of a grammar, unless there is none or it has ended by itself. The lock is held."""
        process = self._alive.get(key)
        if process is None:
            return None
        if process.is_alive():
            self._alive.move_to_end(key)
            return process
        del self._alive[key]
        process.close()
        return None

    def _leave(self, job: _Job, future: Future[Place]) -> None:
        if not future.cancelled():
            return
        with self._lock:
            job.waiters = [waiter for waiter in job.waiters if waiter[0] is not future]
            is_unwanted = not job.waiters and self._jobs.get(job.key) is job
            if is_unwanted:
                del self._jobs[job.key]
        if is_unwanted:
            self._queue.drop(job.compilation)

    def _finish(self, job: _Job, outcome: GrammarProcess | Exception) -> None:
        """Tell those who wait, and keep the process, or what is wrong."""
        spare: list[GrammarProcess] = []
        with self._lock:
            if self._jobs.get(job.key) is job:
                del self._jobs[job.key]
            waiters = [w for w in job.waiters if w[0].set_running_or_notify_cancel()]
            if isinstance(outcome, GrammarProcess):
                places = [_place(outcome, begins) for _, _, begins in waiters]
                spare, outcome = self._keep(job.key, outcome)
            if isinstance(outcome, RefusedError) or (isinstance(outcome, ProcessEndedError) and outcome.is_grammars):
                self._note(job.key, _wrong(outcome, self._limits))
        for process in spare:
            process.close()
        for i, (future, spec, _) in enumerate(waiters):
            if isinstance(outcome, GrammarProcess):
                future.set_result(places[i])
            else:
                future.set_exception(_error(outcome, spec, self._limits))

    def _keep(self, key: Key, process: GrammarProcess) -> tuple[list[GrammarProcess], GrammarProcess | Exception]:
        """(processes that must go, the new one or why it cannot stay). The lock is held."""
        self._note(key, None)
        self._alive[key] = process
        spare = []
        most_kib = TOTAL_PROCESSES * self._limits.process_mib << 10
        idle = [k for k, p in self._alive.items() if not p.num_followers and p is not process]
        used_kib = sum(p.kib for p in self._alive.values())
        while idle and (len(idle) > MAX_IDLE or used_kib > most_kib):
            spare.append(self._alive.pop(idle.pop(0)))
            used_kib -= spare[-1].kib
        if used_kib > most_kib:
            spare.append(self._alive.pop(key))
            return spare, OverloadedError(
                "the grammars in use take all memory that there is for them", retry_after_s=10
            )
        return spare, process

    def _note(self, key: Key, verdict: Verdict) -> None:
        self._verdicts[key] = verdict
        if len(self._verdicts) > MAX_KNOWN:
            self._verdicts.popitem(last=False)


def _place(process: GrammarProcess, begins: bool) -> Place:
    return Place(process, process.begin() if begins else None)


def _refusal(spec: GrammarSpec, wrong: str) -> InvalidRequestError:
    return InvalidRequestError(spec.param, f"{spec.param}: {wrong}")


def _wrong(outcome: Exception, limits: GrammarLimits) -> str:
    if isinstance(outcome, TooSlowError):
        return f"it cannot be compiled: it takes longer than {limits.compile_s:g} s of CPU time; make it smaller"
    return f"it cannot be compiled: {outcome}" if isinstance(outcome, ProcessEndedError) else str(outcome)


def _error(outcome: Exception, spec: GrammarSpec, limits: GrammarLimits) -> Exception:
    """What a waiter is told; each names its own field."""
    if isinstance(outcome, ProcessEndedError) and not outcome.is_grammars:
        return OverloadedError(f"the grammar could not be compiled: {outcome}", retry_after_s=10)
    if isinstance(outcome, TooSlowError) and outcome.is_busy:
        return OverloadedError("the machine is too busy to compile the grammar", retry_after_s=10)
    if isinstance(outcome, RefusedError | ProcessEndedError | TooSlowError):
        return _refusal(spec, _wrong(outcome, limits))
    if isinstance(outcome, MoEServeError):
        return outcome
    return MoEServeError(f"the grammar could not be compiled ({type(outcome).__name__})")


def vocabulary_of(tokenizer: Tokenizer, vocab_size: int, eos_token_ids: frozenset[int]) -> Vocabulary:
    """What grammars' processes must know of a tokenizer."""
    backend = copy.copy(tokenizer.backend)
    backend.no_padding()
    backend.no_truncation()
    return Vocabulary(backend.to_str(), max(vocab_size, tokenizer.vocab_size), sorted(eos_token_ids))
