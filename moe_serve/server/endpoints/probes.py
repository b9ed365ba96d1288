"""What a server needs around its endpoints: probes, the layers every request passes, and who it lets in.

Knows settings and middlewares; knows no model.
"""

from __future__ import annotations

import ipaddress
import logging
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from moe_serve.config import ServerConfig
from moe_serve.config.units import MIB
from moe_serve.engine.async_engine import EngineState
from moe_serve.server.endpoints import ranks
from moe_serve.server.monitoring.access_log import ID_HEADER, AccessLog
from moe_serve.server.transport.auth import Auth
from moe_serve.server.transport.body_limit import BodyLimit

if TYPE_CHECKING:
    from moe_serve.server.app import Service

log = logging.getLogger(__name__)


def install(app: FastAPI, service: Service) -> None:
    """Probes, with the spellings of Kubernetes' and vLLM's users."""
    engine = service.engine

    @app.get("/health")
    @app.get("/ping")
    @app.post("/ping")
    async def health() -> Response:
        """200 while requests are served; 503 while loading, draining, dead or short of ranks, and which of these."""
        trouble = ranks.trouble_of(engine.engine)
        if trouble is not None and engine.state is EngineState.READY:
            return JSONResponse(trouble, 503)
        return JSONResponse({"status": engine.state}, 200 if engine.state is EngineState.READY else 503)

    @app.get("/live")
    async def live() -> Response:
        """503 only when a restart would help."""
        return JSONResponse({"status": engine.state}, 503 if engine.state is EngineState.DEAD else 200)

    @app.get("/load")
    async def load() -> dict[str, Any]:
        """What balancers of load ask for."""
        return {"server_load": engine.num_in_flight, "num_queued": engine.num_queued}


def guard(app: ASGIApp, config: ServerConfig, keys: frozenset[str]) -> ASGIApp:
    """The layers around the application; a request passes them from the last one here to the first."""
    app = BodyLimit(app, int(config.max_body_mib * MIB), config.read_timeout_s)
    if keys:
        app = Auth(app, keys)
    if config.allowed_origins:  # outside Auth: a browser asks for permission before it shows its key
        app = CORSMiddleware(
            app,
            allow_origins=config.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=[ID_HEADER, "Retry-After"],
        )
    return AccessLog(app)


def warn_if_open(config: ServerConfig, keys: frozenset[str]) -> None:
    """Say so when everyone on the network may use this server."""
    if not keys and not _is_loopback(config.host):
        log.warning(
            "listening on %s without an API key: anyone who reaches this port can use the server;"
            " set MOE_SERVE_API_KEY or --api-key-file, or listen on 127.0.0.1",
            config.host,
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
