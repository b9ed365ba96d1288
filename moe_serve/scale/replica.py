"""One replica: an engine behind the ordinary HTTP application, without a port.

Knows no Ray: any process can hold one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from moe_serve.config import EngineConfig, ServerConfig
from moe_serve.errors import EngineDeadError
from moe_serve.scale.autoscaling import IN_FLIGHT, PLACES, QUEUE_S
from moe_serve.scale.exchange import Request, answer

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import Message

    from moe_serve.engine.async_engine import AsyncEngine


class Replica:
    """Loads the model, then answers whole requests."""

    def __init__(self, engine: EngineConfig, server: ServerConfig) -> None:
        self._engine_config, self._server_config = engine, server
        self.name = "replica"
        self._loading: asyncio.Task[FastAPI] | None = None
        self._running = AsyncExitStack()

    async def exchange(self, request: Request) -> AsyncGenerator[list[Message]]:
        """The ASGI messages that answer a request, as they come. Closing the generator aborts the request."""
        async for messages in answer(await self._app(), request):
            yield messages

    async def check_health(self) -> None:
        """Raises EngineDeadError once only a restart helps."""
        from moe_serve.engine.async_engine import EngineState

        engine = await self._engine()
        if engine.state is EngineState.DEAD:
            raise EngineDeadError(engine.cause or "the engine has died")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `wanted_replicas` wants to know of this replica."""
        engine = await self._engine()
        waits = [pending.request.arrival_time_s for pending in engine.in_flight if pending.first_output_s is None]
        queue_s = time.monotonic() - min(waits) if engine.num_queued and waits else 0.0
        return {QUEUE_S: queue_s, IN_FLIGHT: engine.num_in_flight, PLACES: engine.core.config.max_num_seqs}

    async def metrics(self) -> tuple[str, str]:
        """This replica's name, and its /metrics."""
        metrics = (await self._app()).state.service.metrics
        return self.name, (await metrics.scrape.text()).decode()

    async def close(self) -> None:
        """Ends the engine; requests in flight get their time to finish."""
        await self._running.aclose()

    async def _engine(self) -> AsyncEngine:
        engine: AsyncEngine = (await self._app()).state.service.engine
        return engine

    async def _app(self) -> FastAPI:
        if self._loading is None:
            self._loading = asyncio.create_task(self._load())
        return await asyncio.shield(self._loading)

    async def _load(self) -> FastAPI:
        from moe_serve.server.run import app_without_port

        app = await asyncio.to_thread(app_without_port, self._server_config, self._engine_config)
        await self._running.enter_async_context(app.router.lifespan_context(app))
        return app
