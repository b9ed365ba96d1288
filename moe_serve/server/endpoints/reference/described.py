"""Every route of every endpoint file: its method, path, body and what it does, read from the files.

Knows FastAPI's routes; needs no engine.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from fastapi.routing import APIRoute

from moe_serve.server import endpoints
from moe_serve.server.endpoints.bodies.given import body_class_of
from moe_serve.server.endpoints.bodies.parsing import Body


@dataclass(frozen=True, slots=True)
class DescribedRoute:
    """One method of one path."""

    method: str
    path: str
    body_class: type[Body] | None
    summary: str
    """The first paragraph of its function's docstring."""
    in_schema: bool
    """Part of the documented API, not of the dashboard."""


def described_routes() -> list[DescribedRoute]:
    """In the order of the files, and in each as they stand there."""
    found = []
    for module in endpoints.find():
        for route in module.router.routes:
            assert isinstance(route, APIRoute)
            text = inspect.getdoc(route.endpoint) or ""
            summary = " ".join(text.partition("\n\n")[0].split())
            for method in sorted(route.methods or ()):
                body = body_class_of(route.endpoint)
                found.append(DescribedRoute(method, route.path_format, body, summary, route.include_in_schema))
    return found
