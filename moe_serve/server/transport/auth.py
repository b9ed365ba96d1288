"""API keys: who may call, checked before anything is read. Knows ASGI headers; knows no endpoint's meaning.

As vLLM and OpenAI: `Authorization: Bearer KEY`; as Anthropic: `x-api-key: KEY`. `Basic` with the key as password works
too, since that is what a browser that opens the dashboard, Prometheus and `curl -u :KEY` can send without help.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
from collections.abc import Mapping
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from moe_serve.config import ServerConfig
from moe_serve.errors import ConfigError, UnauthorizedError
from moe_serve.server.transport.http_errors import error_response

KEY_VARIABLE = "MOE_SERVE_API_KEY"
OPEN_PATHS = frozenset({"/health", "/live", "/ping", "/version"})
"""What probes and load balancers ask, which have no key. Everything else needs one, /metrics included."""
BROWSER_PATHS = ("/dashboard",)
"""Pages: a browser is told to ask its user for the key."""


def read_keys(config: ServerConfig, environment: Mapping[str, str] = os.environ) -> frozenset[str]:
    """Keys of all sources together. ConfigError: an empty key, or a file that cannot be read or holds none."""
    keys = [*config.api_key, *_keys_in_file(config.api_key_file)]
    if KEY_VARIABLE in environment:
        keys.append(environment[KEY_VARIABLE])
    if not all(key.strip() for key in keys):
        raise ConfigError(f"an empty API key would let everyone in; check --api-key and {KEY_VARIABLE}")
    return frozenset(key.strip() for key in keys)


def _keys_in_file(name: str | None) -> list[str]:
    if name is None:
        return []
    try:
        lines = [line.strip() for line in Path(name).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file: cannot read {name}: {error}") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"--api-key-file: {name} holds no key; write one per line")
    return keys


class ApiKeys:
    """Answers whether a request's headers carry one of the keys, in time that tells nothing about them."""

    def __init__(self, keys: frozenset[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def find(self, headers: Headers) -> str | None:
        """The digest of the key that the headers carry, if it is one of these."""
        # All of them, always; clients may send a stale key in one header and the right one in the other.
        for given in (_digest(_key_in(headers)), _digest(headers.get("x-api-key", "").strip().encode("latin-1"))):
            if any([hmac.compare_digest(given, digest) for digest in self._digests]):
                return given.hex()
        return None


def _digest(key: bytes) -> bytes:
    """Digests are all of one length, so a comparison does not even tell that of the key."""
    return hashlib.sha256(key).digest()


def _key_in(headers: Headers) -> bytes:
    """The key of an Authorization header; no key is empty, so empty stands for none."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode("latin-1")
    # A browser adds Basic to whatever another site makes it send; those requests say so.
    if scheme.lower() == "basic" and headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
        return _password(value)
    return b""


def _password(value: str) -> bytes:
    try:
        return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return b""


class Auth:
    """Middleware: 401 for a request without a key, before its body is read.

    `request.state.key_owner` tells keys apart. Where there are several, `prefix_owner` does so for cached prefixes.
    """

    def __init__(self, app: ASGIApp, keys: frozenset[str], share_prefixes: bool = False) -> None:
        self._app = app
        self._keys = ApiKeys(keys)
        self._tells_apart = len(keys) > 1 and not share_prefixes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        owner = self._keys.find(Headers(scope=scope))
        if owner is not None:
            scope.setdefault("state", {})["key_owner"] = owner
            if self._tells_apart:
                scope.setdefault("state", {})["prefix_owner"] = owner
            await self._app(scope, receive, send)
            return
        kind = "Basic" if scope["path"].startswith(BROWSER_PATHS) else "Bearer"
        error = UnauthorizedError("no valid API key; send it as `Authorization: Bearer KEY` or `x-api-key: KEY`")
        headers = {"WWW-Authenticate": f'{kind} realm="moe-serve"', "Connection": "close"}
        await error_response(error, scope["path"], headers)(scope, receive, send)
