"""RequestQueue: requests in flight, those that wait for a seat in the batch, and those that are refused.

Knows requests, their mailboxes and their timers, all on the event loop; knows no thread and no engine.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from moe_serve.config import EngineConfig
from moe_serve.engine.mailbox import Mailbox
from moe_serve.errors import (
    InvalidRequestError,
    MoEServeError,
    OverloadedError,
    RequestTimeoutError,
    TooManyRequestsError,
)
from moe_serve.scheduling.admission import Admission
from moe_serve.scheduling.sequence import Request, SampleOutput

MAX_UNREAD = 256
"""Outputs of each sample that wait for the client, before the request is paused."""
RESUME_UNREAD = 64


@dataclass(slots=True)
class Pending:
    """A request as the event loop sees it, from submission to its last output."""

    request: Request
    mailbox: Mailbox[SampleOutput | MoEServeError] = field(default_factory=Mailbox)
    unfinished: int = 1
    """Samples that have not ended."""
    first_output_s: float | None = None
    """None: no output yet, so it counts against the queue limits."""
    num_output_tokens: int = 0
    """Of all samples so far."""
    timers: list[asyncio.TimerHandle] = field(default_factory=list)
    is_paused: bool = False
    """Its client does not read."""


class RequestQueue:
    """Requests in flight, and the limits of the queue."""

    def __init__(
        self, config: EngineConfig, give_up: Callable[[str, str], None], pause: Callable[[str, bool], None]
    ) -> None:
        """`give_up(request_id, reason)`: has `refuse_late` called, unless the batch has taken the request meanwhile.
        `pause(request_id, whether)`: nothing more, or more again, is computed for the request."""
        self._config = config
        self._give_up = give_up
        self._pause = pause
        self._admission = Admission(config)
        self._in_flight: dict[str, Pending] = {}
        self._by_client: Counter[str] = Counter()

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def pending(self) -> list[Pending]:
        """The requests in flight, the oldest first."""
        return list(self._in_flight.values())

    @property
    def request_ids(self) -> list[str]:
        """Of the requests in flight."""
        return list(self._in_flight)

    @property
    def num_queued(self) -> int:
        """Requests that have produced nothing yet, beyond the ones a step can hold."""
        without_output = len(self._without_output())
        running = len(self._in_flight) - without_output
        return max(0, without_output - max(0, self._config.max_num_seqs - running))

    def enter(self, request: Request) -> Pending:
        """Take a request in.

        InvalidRequestError: its id is in flight already. TooManyRequestsError: too many of its client's are.
        OverloadedError: it may not wait.
        """
        if request.request_id in self._in_flight:
            raise InvalidRequestError("request_id", f"a request with id {request.request_id!r} is already running")
        self._check_client(request.client)
        self._check_queue(request)
        self._by_client[request.client] += 1
        in_flight = self._in_flight[request.request_id] = Pending(request, unfinished=request.params.n)
        self._set_timers(in_flight)
        return in_flight

    def leave(self, in_flight: Pending) -> None:
        """The client has all it wants, or has left."""
        del self._in_flight[in_flight.request.request_id]
        client = in_flight.request.client
        self._by_client[client] -= 1
        if not self._by_client[client]:
            del self._by_client[client]
        for timer in in_flight.timers:
            timer.cancel()

    def deliver(self, outputs: list[SampleOutput]) -> None:
        """Hand one step's outputs to their requests."""
        now = time.monotonic()
        for output in outputs:
            in_flight = self._in_flight.get(output.request_id)
            if in_flight is not None:
                if in_flight.first_output_s is None:
                    in_flight.first_output_s = now
                in_flight.num_output_tokens += len(output.token_ids)
                in_flight.mailbox.put(output)
                self._note_unread(in_flight)
                if output.finish_reason is not None:
                    self._admission.note_finished(now - in_flight.first_output_s)

    def note_read(self, in_flight: Pending) -> None:
        """The client has taken an output."""
        if in_flight.is_paused and len(in_flight.mailbox) <= RESUME_UNREAD:
            self._set_paused(in_flight, False)

    def _note_unread(self, in_flight: Pending) -> None:
        if not in_flight.is_paused and len(in_flight.mailbox) >= MAX_UNREAD * in_flight.request.params.n:
            self._set_paused(in_flight, True)

    def _set_paused(self, in_flight: Pending, is_paused: bool) -> None:
        in_flight.is_paused = is_paused
        self._pause(in_flight.request.request_id, is_paused)

    def refuse(self, request_id: str, error: MoEServeError) -> None:
        """End one request with an error."""
        in_flight = self._in_flight.get(request_id)
        if in_flight is not None:
            in_flight.mailbox.put(error)

    def refuse_late(self, request_id: str, reason: str) -> None:
        """End a request that has waited, with the error of one that is refused on arrival."""
        self.refuse(request_id, self._admission.refusal(self.num_queued, reason))

    def _set_timers(self, in_flight: Pending) -> None:
        """Have a request end that takes, or waits, longer than it may."""
        loop, request_id = asyncio.get_running_loop(), in_flight.request.request_id
        limits = self._config.queue
        longest_s, wait_s = limits.request_timeout_s, limits.max_queue_wait_s
        if longest_s is not None:
            error = RequestTimeoutError(f"the request did not finish within {longest_s:g} s, this server's limit")
            in_flight.timers.append(loop.call_later(longest_s, self.refuse, request_id, error))
        if wait_s is not None:
            reason = f"no seat in the batch became free within {wait_s:g} s"
            in_flight.timers.append(loop.call_later(wait_s, self._give_up, request_id, reason))

    def _check_client(self, client: str) -> None:
        most = self._config.queue.max_concurrent_per_client
        if most is not None and self._by_client[client] >= most:
            message = f"this client has {most} requests in flight, the most that this server takes of one"
            raise TooManyRequestsError(f"{message}; wait for their answers", self._admission.retry_after_s)

    def _check_queue(self, request: Request) -> None:
        """OverloadedError if every seat is taken and the queue has no room."""
        num_queued = self.num_queued
        self._admission.note_arrival(num_queued)
        if len(self._in_flight) < self._config.max_num_seqs:
            return
        was_overloaded = self._admission.is_overloaded
        try:
            self._admission.check(num_queued, len(request.prompt_token_ids), self._num_queued_tokens)
        except OverloadedError:
            if self._admission.is_overloaded and not was_overloaded:
                self._shorten_queue(num_queued)
            raise

    def _shorten_queue(self, num_queued: int) -> None:
        """An overload begins: refuse the requests beyond those that may wait in it, so that they delay no others."""
        in_turn = sorted(self._without_output(), key=lambda r: r.priority)
        num_kept = len(in_turn) - num_queued + self._admission.num_standing
        for request in in_turn[num_kept:]:
            reason = "the server is overloaded, and this request was at the end of the queue"
            self._give_up(request.request_id, reason)

    def _num_queued_tokens(self) -> int:
        return sum(len(r.prompt_token_ids) for r in self._without_output())

    def _without_output(self) -> list[Request]:
        return [f.request for f in self._in_flight.values() if f.first_output_s is None]
