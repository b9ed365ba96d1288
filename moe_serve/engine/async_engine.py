"""AsyncEngine: the engine on a worker thread, requests and outputs over mailboxes.

One thread owns the engine and steps it while there is work. The event loop never touches engine
state: it puts commands into an inbox and reads outputs from one mailbox per request. Who may wait, and
for how long, reception.py knows. Knows threads and asyncio; knows no HTTP.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from enum import StrEnum
from typing import Any, Protocol, TypeVar

from expert_cache.report import ExpertReport
from moe_serve.config import EngineConfig
from moe_serve.engine.request_queue import Pending, RequestQueue
from moe_serve.engine.trouble import Trouble
from moe_serve.errors import CheckpointChangedError, EngineDeadError, MoEServeError, NotServingError
from moe_serve.expert_routes.route_recorder import RouteObserver
from moe_serve.scheduling.sequence import Request, SampleOutput
from moe_serve.scheduling.stats import StatsObserver
from predictors.predictor import RouterShape

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_FAILED_STEPS = 3
"""Consecutive steps that may raise before the engine is declared dead."""


class EngineLike(Protocol):
    """What AsyncEngine needs of an engine.

    Checks, reports and `is_waiting` may run on any thread, all else on the worker thread.
    """

    config: EngineConfig
    observer: StatsObserver | None
    max_model_len: int
    num_pages: int
    page_size: int

    def check_request(self, request: Request) -> None: ...
    def begin_check(self, request: Request) -> Future[Any] | None: ...
    def add_request(self, request: Request) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def pause(self, request_id: str, is_paused: bool) -> None: ...
    def is_waiting(self, request_id: str) -> bool: ...
    def step(self) -> list[SampleOutput]: ...
    def has_work(self) -> bool: ...
    def fail_running(self, message: str) -> list[SampleOutput]: ...
    def resize_expert_cache(self, moe_cache_mib: int) -> None: ...
    def expert_report(self) -> ExpertReport | None: ...
    def routing_shape(self) -> RouterShape: ...
    def observe_routes(self, observer: RouteObserver, wanted: bool = True) -> None: ...
    def trouble(self) -> Trouble | None: ...
    def close(self) -> None: ...


class EngineState(StrEnum):
    """READY serves; DRAINING finishes what it has; STOPPED and DEAD serve nothing."""

    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    DEAD = "dead"


class AsyncEngine:
    """Many concurrent `generate` calls over one engine."""

    def __init__(self, engine: EngineLike) -> None:
        self.core = engine
        """The engine itself. Its facts may be read from any thread; all else belongs to the worker thread."""
        self.state = EngineState.READY
        self.cause: str | None = None
        """A sentence for clients on why it is dead, where that is known."""
        self._wake = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        give_up = functools.partial(self._post, self._give_up)
        self._reception = RequestQueue(engine.config, give_up, functools.partial(self._post, engine.pause))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="moe-serve-engine", daemon=True)

    # ---- event-loop side ------------------------------------------------------------------------

    def start(self) -> None:
        """Start the worker thread. Call from the event loop that will consume outputs."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def num_in_flight(self) -> int:
        """Accepted requests whose last output has not been handed over."""
        return self._reception.num_in_flight

    @property
    def in_flight(self) -> list[Pending]:
        """Those requests, the oldest first."""
        return self._reception.pending

    @property
    def num_queued(self) -> int:
        """Accepted requests that have produced nothing yet, beyond the ones a step can hold."""
        return self._reception.num_queued

    async def generate(self, request: Request) -> AsyncGenerator[SampleOutput]:
        """Outputs of all samples of a request, as they come; leaving the iterator aborts it. It is computed no further
        while MAX_UNREAD outputs wait for the iterator.

        Raises InvalidRequestError, OverloadedError or EngineDeadError before the first output.
        """
        await self.check(request)
        in_flight = self.submit(request)
        try:
            while in_flight.unfinished > 0:
                output = await in_flight.mailbox.get()
                self._reception.note_read(in_flight)
                if isinstance(output, MoEServeError):
                    raise output
                in_flight.unfinished -= output.finish_reason is not None
                yield output
        finally:
            self._reception.leave(in_flight)
            if in_flight.unfinished > 0:
                self._post(self.core.abort, request.request_id)

    async def check(self, request: Request) -> None:
        """Raise what makes a request impossible. Its grammar is compiled elsewhere; being cancelled ends that."""
        if (compiling := self.core.begin_check(request)) is not None:
            await asyncio.wrap_future(compiling)

    async def call(self, function: Callable[[], T]) -> T:
        """What `function` returns, or raises, on the engine's thread between two steps."""
        self._check_serving()
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def run() -> None:
            try:
                result = function()
            except Exception as error:
                self._call_loop(_fail, done, error)
            else:
                self._call_loop(_settle, done, result)

        self._post(run)
        return await done

    def submit(self, request: Request) -> Pending:
        """Accept a request or raise why not; `generate` reads its outputs."""
        self._check_serving()
        self.core.check_request(request)
        in_flight = self._reception.enter(request)
        self._post(self._admit, request)
        return in_flight

    def _check_serving(self) -> None:
        if self.state is EngineState.DEAD:
            raise EngineDeadError(self.cause or "the engine has died after repeated errors; restart the server")
        if self.state is not EngineState.READY:
            raise NotServingError("the server is shutting down", retry_after_s=10)

    async def shutdown(self, drain_timeout_s: float = 0.0) -> None:
        """Refuse new requests, give the running ones `drain_timeout_s`, abort the rest, end the thread."""
        if self.state is EngineState.STOPPED:
            return
        if self.state is EngineState.READY:
            self.state = EngineState.DRAINING
        deadline = time.monotonic() + drain_timeout_s
        while self.num_in_flight and time.monotonic() < deadline and self.state is EngineState.DRAINING:
            await asyncio.sleep(0.02)
        for request_id in self._reception.request_ids:
            self._post(self.core.abort, request_id)
            self._reception.refuse(request_id, NotServingError("the server is shutting down", retry_after_s=10))
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)
        self.core.close()
        if self.state is not EngineState.DEAD:
            self.state = EngineState.STOPPED

    def _post(self, function: Callable[..., None], *arguments: Any) -> None:
        """Have the worker thread call `function` before its next step."""
        with self._wake:
            self._inbox.append(functools.partial(function, *arguments))
            self._wake.notify()

    def _die(self, message: str, cause: str | None = None) -> None:
        """Tell every request that the engine is gone; on the event loop."""
        self.state, self.cause = EngineState.DEAD, cause
        for request_id in self._reception.request_ids:
            self._reception.refuse(request_id, EngineDeadError(message))

    # ---- worker-thread side -----------------------------------------------------------------------

    def _work(self) -> None:
        try:
            self._loop_steps()
        except CheckpointChangedError as error:
            log.critical("%s", error.message)
            self._call_loop(self._die, error.message, error.message)
        except Exception as error:  # not a step that failed, but the handling of it
            log.critical("the engine thread ends", exc_info=error)
            self._call_loop(self._die, f"the engine died: {error}")

    def _loop_steps(self) -> None:
        failures = 0
        while True:
            commands = self._next_commands()
            if commands is None:
                return
            outputs, error = self._advance(commands)
            failures = failures + 1 if error else 0
            if outputs:
                self._call_loop(self._reception.deliver, outputs)
            if failures >= MAX_FAILED_STEPS:
                log.critical("%d steps in a row failed; the engine stops", failures)
                self._call_loop(self._die, f"the engine died: {error}")
                return

    def _next_commands(self) -> list[Callable[[], None]] | None:
        """Wait for something to do; None means stop."""
        with self._wake:
            while not self._inbox and not self._stopping and not self.core.has_work():
                self._wake.wait()
            if self._stopping and not self._inbox:
                return None
            commands, self._inbox = self._inbox, []
            return commands

    def _advance(self, commands: list[Callable[[], None]]) -> tuple[list[SampleOutput], str | None]:
        """Run commands and one step; an error ends the requests it hit and nothing else. CheckpointChangedError."""
        for command in commands:
            self._run(command)
        try:
            return (self.core.step() if self.core.has_work() else []), None
        except CheckpointChangedError:
            raise
        except Exception as error:
            log.exception("an engine step failed")
            return self.core.fail_running(f"the engine failed on this request ({type(error).__name__})"), str(error)

    def _run(self, command: Callable[[], None]) -> None:
        """Run one command; if it raises, the others of the batch still run."""
        try:
            command()
        except Exception:
            log.exception("an engine command failed")

    def _admit(self, request: Request) -> None:
        """Give the engine a request. If it raises, this request ends with the error and leaves nothing behind."""
        try:
            self.core.add_request(request)
        except Exception as error:
            if not isinstance(error, MoEServeError):
                log.exception("the engine could not take request %s", request.request_id)
                error = MoEServeError(f"the engine could not take this request ({type(error).__name__})")
            self._call_loop(self._reception.refuse, request.request_id, error)
            self.core.abort(request.request_id)

    def _give_up(self, request_id: str, reason: str) -> None:
        """Refuse a request that waits, unless the batch has taken it meanwhile."""
        if self.core.is_waiting(request_id):
            self.core.abort(request_id)
            self._call_loop(self._reception.refuse_late, request_id, reason)

    def _call_loop(self, function: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)


def _settle(done: asyncio.Future[T], result: T) -> None:
    """Set the future's result, unless its waiter has cancelled it."""
    if not done.cancelled():
        done.set_result(result)


def _fail(done: asyncio.Future[T], error: Exception) -> None:
    if not done.cancelled():
        done.set_exception(error)
