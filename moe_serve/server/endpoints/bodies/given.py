"""What a route's function can ask for: the service, and the request's body, parsed.

Knows FastAPI's dependencies; knows no endpoint.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar, get_type_hints

from fastapi import Depends
from fastapi import Request as HttpRequest

from moe_serve.server.endpoints.answers.response_store import ResponseStore
from moe_serve.server.endpoints.bodies.parsing import MAX_ELEMENTS, Body, BodyT, check_media_type, parse
from moe_serve.server.service import Service

T = TypeVar("T")

ELEMENTS_PER_TOKEN = 4
"""Of a body, for servers with a long context: text in escaped characters, or ids of several prompts."""


async def _service_of(http: HttpRequest) -> Service:
    service: Service = http.app.state.service
    return service


TheService = Annotated[Service, Depends(_service_of)]


async def _responses_of(http: HttpRequest) -> ResponseStore:
    store: ResponseStore = http.app.state.responses
    return store


TheResponses = Annotated[ResponseStore, Depends(_responses_of)]


def parsed(body_class: type[BodyT]) -> Callable[[HttpRequest], Awaitable[BodyT]]:
    """The dependency that reads a JSON body: `body: Annotated[XBody, Depends(parsed(XBody))]`."""

    async def read(http: HttpRequest) -> BodyT:
        service = await _service_of(http)
        raw = await http.body()
        http.state.num_body_bytes = len(raw)
        if raw:
            check_media_type(http.headers)
        most = max(MAX_ELEMENTS, ELEMENTS_PER_TOKEN * service.max_model_len)
        return await service.preparation.run(len(raw), lambda: parse(raw, body_class, most))

    return read


async def prepared(http: HttpRequest, work: Callable[[], T]) -> T:
    """What `work` makes of the parsed body, on a thread if the body is large. Errors of both apply."""
    service = await _service_of(http)
    return await service.preparation.run(http.state.num_body_bytes, work)


def body_class_of(route_function: Callable[..., Any]) -> type[Body] | None:
    """The body that a route's function asks for, if it takes one."""
    hints = get_type_hints(route_function).values()
    return next((hint for hint in hints if isinstance(hint, type) and issubclass(hint, Body)), None)
