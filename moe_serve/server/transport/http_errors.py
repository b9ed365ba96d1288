"""Errors as responses, in the shape that a path's clients read: OpenAI's, or Anthropic's. Never a bare 500.

OpenAI's is {"error": {message, type, param, code}}, Anthropic's {"type": "error", "error": {type, message}}.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from moe_serve.errors import (
    BodyTooLargeError,
    ContextTooLongError,
    MoEServeError,
    OverloadedError,
    SlowClientError,
    TooManyRequestsError,
)

log = logging.getLogger(__name__)

CLIENT_CLOSED = 499
"""nginx's status for a client that hung up; no client reads it."""
ANTHROPIC_PATH = "/v1/messages"
"""This path, and those below it, answer Anthropic's clients."""
ANTHROPIC_TYPES = MappingProxyType(
    {
        400: "invalid_request_error",
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        413: "request_too_large",
        429: "rate_limit_error",
        504: "timeout_error",
    }
)
"""Anthropic's names of errors by status. Other statuses: invalid_request_error below 500, api_error above."""


WHAT_IS_SERVED = (
    "this server writes text, at /v1/chat/completions, /v1/completions, /v1/responses and /v1/messages;"
    " it has no embeddings, audio, images or files"
)
"""For a path that is not there."""
NO_HEADERS: Mapping[str, str] = MappingProxyType({})
COME_BACK = (OverloadedError, TooManyRequestsError)
"""Errors that say when to try again."""
CLOSE = {"Connection": "close"}
"""For answers given before the body was read: what is still under way would be taken for the next request."""


def error_response(error: MoEServeError, path: str, headers: Mapping[str, str] = NO_HEADERS) -> JSONResponse:
    """The whole answer to a request for `path`, for code outside the endpoints."""
    retry = {"Retry-After": str(error.retry_after_s)} if isinstance(error, COME_BACK) else {}
    return JSONResponse(error_body(error, path), error.http_status, {**retry, **headers})


def error_body(error: MoEServeError, path: str = "") -> dict[str, Any]:
    """The JSON object that the clients of `path` expect; OpenAI's where none is given. The tool runner of Anthropic's
    client asks for a thread at first. By the details of the refusal it knows to send whole conversations."""
    if not is_anthropic(path):
        return body_of(error.message, error.error_type, getattr(error, "param", None), error.http_status)
    kind = "overloaded_error" if isinstance(error, OverloadedError) else _anthropic_type(error.http_status)
    # Agents make room in the conversation when they read these words.
    told = "prompt is too long: " if isinstance(error, ContextTooLongError) else ""
    body = _anthropic_body(kind, told + error.message)
    if getattr(error, "param", None) == "thread":
        body["error"]["details"] = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    return body


def body_of(message: str, error_type: str, param: str | None, code: int) -> dict[str, Any]:
    """OpenAI's shape, from its parts."""
    return {"error": {"message": message, "type": error_type, "param": param, "code": code}}


def is_anthropic(path: str) -> bool:
    """Whether Anthropic's clients call this path."""
    return path == ANTHROPIC_PATH or path.startswith(ANTHROPIC_PATH + "/")


def _anthropic_type(status: int) -> str:
    return ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")


def _anthropic_body(kind: str, message: str) -> dict[str, Any]:
    return {"type": "error", "error": {"type": kind, "message": message}}


def _plain_body(path: str, message: str, error_type: str, status: int) -> dict[str, Any]:
    """Of an error that is none of ours."""
    if is_anthropic(path):
        return _anthropic_body(_anthropic_type(status), message)
    return body_of(message, error_type, None, status)


def install(app: FastAPI) -> None:
    """Answer our own errors, HTTP errors and unexpected ones in the same shape."""
    app.add_exception_handler(MoEServeError, _ours)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _unexpected)


async def _ours(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, MoEServeError)
    headers = CLOSE if isinstance(error, BodyTooLargeError | SlowClientError) else NO_HEADERS
    return error_response(error, request.url.path, headers)


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    path = request.url.path
    message = f"{request.method} {path}: {error.detail}"
    if error.status_code == 404:
        message += f"; {WHAT_IS_SERVED}"
    body = _plain_body(path, message, "invalid_request_error", error.status_code)
    return JSONResponse(body, error.status_code, error.headers)


async def _gone(request: Request, error: Exception) -> Response:
    """The client left, perhaps before its body was read: an everyday event that needs no answer."""
    return Response(status_code=CLIENT_CLOSED)


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    path = request.url.path
    log.error("%s %s failed", request.method, path, exc_info=error)
    return JSONResponse(
        _plain_body(path, "an internal error occurred; see the server's log", "internal_error", 500), 500
    )
