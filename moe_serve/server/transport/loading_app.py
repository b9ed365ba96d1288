"""FrontDoor: answers from the first second, while the model still loads, and hands over when it is there.

The ASGI application that uvicorn runs. Importing torch and loading a model happen on a thread of their own.
Knows the four states of /health and nothing of models; what is behind the door comes from `load`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from moe_serve.errors import NotServingError
from moe_serve.server.transport.http_errors import CLOSE, error_response

if TYPE_CHECKING:
    from fastapi import FastAPI

    from moe_serve.engine.async_engine import AsyncEngine

log = logging.getLogger(__name__)

RETRY_AFTER_LOADING_S = 5


class FrontDoor:
    """503 "loading" until `load` returns, then the application it returned."""

    def __init__(self, load: Callable[[], FastAPI], on_failure: Callable[[], None] = lambda: None) -> None:
        """`load` runs on a thread; `on_failure` is called on the event loop if it raised."""
        self._load = load
        self._on_failure = on_failure
        self._app: FastAPI | None = None
        self._running = AsyncExitStack()
        self._loading: asyncio.Task[None] | None = None
        self.failure: BaseException | None = None
        """What `load` raised."""

    @property
    def is_loading(self) -> bool:
        return self._app is None and self.failure is None

    @property
    def engine(self) -> AsyncEngine | None:
        """The engine behind the door, once there is one."""
        if self._app is None:
            return None
        engine: AsyncEngine = self._app.state.service.engine
        return engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif self._app is not None:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await _answer_loading(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        self._loading = asyncio.create_task(self._open())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self._loading.cancel()  # the thread cannot be stopped; the process ends under it
        await self._running.aclose()
        await send({"type": "lifespan.shutdown.complete"})

    async def _open(self) -> None:
        """Load, start what was loaded, and only then let requests through."""
        try:
            app = await _on_daemon_thread(self._load)
            await self._running.enter_async_context(app.router.lifespan_context(app))
            self._app = app
        except Exception as error:
            self.failure = error
            self._on_failure()


async def _answer_loading(scope: Scope, receive: Receive, send: Send) -> None:
    path = scope["path"]
    if path in ("/live", "/health", "/ping"):
        response = JSONResponse({"status": "loading"}, 200 if path == "/live" else 503)
    else:
        error = NotServingError("the model is still loading", RETRY_AFTER_LOADING_S)
        response = error_response(error, path, CLOSE)
    await response(scope, receive, send)


async def _on_daemon_thread(load: Callable[[], FastAPI]) -> FastAPI:
    """As asyncio.to_thread, but a process that is told to stop while loading need not wait for the thread."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[FastAPI] = loop.create_future()

    def settle(app: FastAPI | None, error: Exception | None) -> None:
        if future.cancelled():
            return
        if app is not None:
            future.set_result(app)
        else:
            assert error is not None
            future.set_exception(error)

    def work() -> None:
        app, error = None, None
        try:
            app = load()
        except Exception as failure:
            error = failure
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, app, error)

    threading.Thread(target=work, name="moe-serve-load", daemon=True).start()
    return await future
