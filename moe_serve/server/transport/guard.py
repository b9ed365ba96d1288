"""The layers every request passes before an endpoint, and what is said where nothing keeps strangers out.

Knows settings and middlewares; knows no model and no endpoint.
"""

from __future__ import annotations

import logging

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from moe_serve.config import ServerConfig
from moe_serve.config.units import MIB
from moe_serve.server.monitoring.access_log import ID_HEADER, AccessLog
from moe_serve.server.transport.auth import Auth
from moe_serve.server.transport.body_limit import BodyLimit
from moe_serve.server.transport.head_requests import HeadRequests
from moe_serve.server.transport.same_site import SameSite, is_loopback

log = logging.getLogger(__name__)


def guard(app: ASGIApp, config: ServerConfig, keys: frozenset[str]) -> ASGIApp:
    """The layers around the application; a request passes them from the last one here to the first."""
    app = HeadRequests(app)
    app = BodyLimit(app, int(config.max_body_mib * MIB), config.read_timeout_s)
    app = SameSite(app, config.allowed_origins, _hosts(config, keys), admin_only=bool(keys))
    if keys:
        app = Auth(app, keys, config.share_prefixes_between_keys)
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
    if not keys and not is_loopback(config.host):
        log.warning(
            "listening on %s without an API key: anyone who reaches this port can use the server;"
            " set MOE_SERVE_API_KEY or --api-key-file, or listen on 127.0.0.1",
            config.host,
        )


def _hosts(config: ServerConfig, keys: frozenset[str]) -> tuple[str, ...] | None:
    """Names to answer to; None for all. A key keeps strangers out, and who listens for a network has names unknown."""
    is_guarded = bool(config.allowed_hosts) or (not keys and is_loopback(config.host))
    return config.allowed_hosts if is_guarded else None
