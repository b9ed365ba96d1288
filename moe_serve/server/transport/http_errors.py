"""Errors as OpenAI-shaped responses: {"error": {message, type, param, code}}. Never a bare 500."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from moe_serve.errors import BodyTooLargeError, MoEServeError, OverloadedError, SlowClientError

log = logging.getLogger(__name__)

CLIENT_CLOSED = 499
"""nginx's status for a client that hung up; no client reads it."""


NO_HEADERS: Mapping[str, str] = MappingProxyType({})
CLOSE = {"Connection": "close"}
"""For answers given before the body was read: what is still under way would be taken for the next request."""


def error_response(error: MoEServeError, headers: Mapping[str, str] = NO_HEADERS) -> JSONResponse:
    """The whole answer, for code outside the endpoints."""
    retry = {"Retry-After": str(error.retry_after_s)} if isinstance(error, OverloadedError) else {}
    return JSONResponse(error_body(error), error.http_status, {**retry, **headers})


def error_body(error: MoEServeError) -> dict[str, Any]:
    """The JSON object clients of the OpenAI API expect."""
    return body_of(error.message, error.error_type, getattr(error, "param", None), error.http_status)


def body_of(message: str, error_type: str, param: str | None, code: int) -> dict[str, Any]:
    """The same, from its parts."""
    return {"error": {"message": message, "type": error_type, "param": param, "code": code}}


def install(app: FastAPI) -> None:
    """Answer our own errors, HTTP errors and unexpected ones in the same shape."""
    app.add_exception_handler(MoEServeError, _ours)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _unexpected)


async def _ours(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, MoEServeError)
    return error_response(error, CLOSE if isinstance(error, BodyTooLargeError | SlowClientError) else NO_HEADERS)


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(
        body_of(message, "invalid_request_error", None, error.status_code), error.status_code, error.headers
    )


async def _gone(request: Request, error: Exception) -> Response:
    """The client left, perhaps before its body was read: an everyday event that needs no answer."""
    return Response(status_code=CLIENT_CLOSED)


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return JSONResponse(body_of("an internal error occurred; see the server's log", "internal_error", None, 500), 500)
