"""DrainingServer: uvicorn's server with an orderly end.

uvicorn closes its port first and then waits, so no probe can ask about the wait. Here the port stays open while
running requests finish: new ones get 503 with Retry-After, and /health says "draining".
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from types import FrameType

import uvicorn

from moe_serve.server.transport.loading_app import FrontDoor

log = logging.getLogger(__name__)

FLUSH_S = 5
"""Time to hand over what has been computed, once nothing is computed any more."""


class DrainingServer(uvicorn.Server):
    """Serves `door`; the first SIGTERM, SIGINT or SIGHUP drains, a second ends the process on the spot."""

    def __init__(
        self, config: uvicorn.Config, door: FrontDoor, drain_timeout_s: float, is_supervised: bool = False
    ) -> None:
        """`is_supervised`: the supervisor ends the process at its own second signal. Here any number of signals is one:
        systemd and terminals signal both processes, and the supervisor forwards."""
        config.timeout_graceful_shutdown = FLUSH_S
        super().__init__(config)
        self._door = door
        self._drain_timeout_s = drain_timeout_s
        self._is_supervised = is_supervised
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None
        self._is_ending = False

    async def startup(self, sockets: object = None) -> None:
        self._loop = asyncio.get_running_loop()
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup has it ignored
            signal.signal(signal.SIGHUP, self.handle_exit)
        await super().startup(sockets=sockets)  # type: ignore[arg-type]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn's signal handler; runs between two instructions of the main thread, so it only hands over."""
        if self._is_ending and self._is_supervised:
            return
        if self._is_ending:
            os._exit(128 + sig)
        self._is_ending = True
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._begin_drain, signal.Signals(sig).name)

    def _begin_drain(self, reason: str) -> None:
        engine = self._door.engine
        if engine is None:
            log.info("%s while the model loads: the server ends", reason)
            self.should_exit = True
            return
        log.info("%s: %d running requests have %g s to finish", reason, engine.num_in_flight, self._drain_timeout_s)
        self._drain = self._loop.create_task(self._drain_and_exit())  # type: ignore[union-attr]

    async def _drain_and_exit(self) -> None:
        engine = self._door.engine
        assert engine is not None
        try:
            await engine.shutdown(self._drain_timeout_s)
        finally:
            self.should_exit = True
