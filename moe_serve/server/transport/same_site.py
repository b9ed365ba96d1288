"""Keeps other sites' pages from driving this server through the browser of someone who may reach it.

A browser sends a page's requests wherever the page says, to loopback too, and a page can have its own name resolve to
127.0.0.1. What it cannot do is lie in Host, Origin and Sec-Fetch-Site. Programs send neither Origin nor Sec-Fetch-Site
and are let through. Knows ASGI headers; knows no endpoint but the paths that change how the server works.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from moe_serve.errors import ForbiddenError
from moe_serve.server.transport.http_errors import CLOSE, error_response

ANY = "*"


class SameSite:
    """Middleware: 403 for a request that another site's page makes, or that names another host."""

    def __init__(
        self, app: ASGIApp, origins: Collection[str], hosts: Collection[str] | None, admin_only: bool = False
    ) -> None:
        """`origins`: whose pages may call. `hosts`: names this server goes by besides loopback's; None: any name.
        `admin_only`: look only at what changes how the server works, since a key guards the rest."""
        self._app = app
        self._origins = frozenset(origins)
        self._hosts = None if hosts is None else frozenset(host.lower() for host in hosts)
        self._admin_only = admin_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        trouble = self._trouble(scope) if scope["type"] == "http" else ""
        if trouble:
            await error_response(ForbiddenError(trouble), scope["path"], CLOSE)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _trouble(self, scope: Scope) -> str:
        """What is wrong with where a request comes from, or empty."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._admin_only and not is_admin(scope):
            return ""
        if not self._knows(host):
            return f"the Host {host[:100]!r} is none of this server's; see --allowed-hosts"
        origin = headers.get("origin")
        if ANY in self._origins or origin in self._origins:
            return ""
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return f"pages of {origin[:100]!r} may not call this server; see --allowed-origins"
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and not _is_visit(scope, headers):
            return "pages of other sites may not call this server; see --allowed-origins"
        return ""

    def _knows(self, host: str) -> bool:
        name = _name_of(host)
        return self._hosts is None or not host or is_loopback(name) or name in self._hosts


def is_admin(scope: Scope) -> bool:
    """Whether a request may change how the server works: any that writes, outside the model's own API."""
    own = scope["path"].startswith("/v1/") or scope["path"] in ("/tokenize", "/detokenize", "/ping")
    return scope["method"] not in ("GET", "HEAD", "OPTIONS") and not own


def is_loopback(name: str) -> bool:
    """Names and addresses that lead to this machine, wherever they are looked up."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def _name_of(host: str) -> str:
    """A Host header without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_visit(scope: Scope, headers: Headers) -> bool:
    """Someone follows a link to a page of ours: reading is all that does."""
    return scope["method"] in ("GET", "HEAD") and headers.get("sec-fetch-mode") == "navigate"
