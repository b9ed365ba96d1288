"""What a route's function can ask for: the service, and the request's body, parsed.

Knows FastAPI's dependencies; knows no endpoint.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, get_type_hints

from fastapi import Depends
from fastapi import Request as HttpRequest

from moe_serve.server.endpoints.bodies.parsing import Body, BodyT, parse
from moe_serve.server.service import Service


async def _service_of(http: HttpRequest) -> Service:
    service: Service = http.app.state.service
    return service


TheService = Annotated[Service, Depends(_service_of)]


def parsed(body_class: type[BodyT]) -> Callable[[HttpRequest], Awaitable[BodyT]]:
    """The dependency that reads a JSON body: `body: Annotated[XBody, Depends(parsed(XBody))]`."""

    async def read(http: HttpRequest) -> BodyT:
        return await parse(http, body_class)

    return read


def body_class_of(route_function: Callable[..., Any]) -> type[Body] | None:
    """The body that a route's function asks for, if it takes one."""
    hints = get_type_hints(route_function).values()
    return next((hint for hint in hints if isinstance(hint, type) and issubclass(hint, Body)), None)
