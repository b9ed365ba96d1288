"""The OpenAPI document: what our raw-body endpoints take and answer, which FastAPI cannot see.

Schemas come from the pydantic bodies that parse the requests, so the document cannot disagree with them.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from moe_serve.server.endpoints.bodies.parsing import Body
from moe_serve.server.endpoints.reference.described import described_routes

SCHEMAS = "#/components/schemas/"
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "The field that is wrong, if one is."},
                "code": {"type": "integer", "description": "The HTTP status again."},
            },
        }
    },
}
ANTHROPIC_ERROR = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}
SSE_EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string", "description": "JSON of a chunk; [DONE] in the last event."}},
}
ERROR_STATUSES = {
    "400": "The request can never succeed as written; `param` names the field.",
    "404": "No such model.",
    "503": "Overloaded, shutting down or dead; the header Retry-After says when to come again.",
}


def install(app: FastAPI) -> None:
    """Serve a complete document at /openapi.json: bodies' schemas, and errors on every endpoint."""
    app.openapi = _Document(app)  # type: ignore[method-assign]


class _Document:
    """The document, made when first asked for."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._made: dict[str, Any] | None = None

    def __call__(self) -> dict[str, Any]:
        if self._made is None:
            self._made = self._make()
        return self._made

    def _make(self) -> dict[str, Any]:
        routes = described_routes()
        made = get_openapi(title=self._app.title, version=self._app.version, routes=self._app.routes)
        bodies = [(route.body_class, "validation") for route in routes if route.body_class is not None]
        definitions = models_json_schema(bodies, ref_template=SCHEMAS + "{model}")[1]["$defs"]  # type: ignore[arg-type]
        schemas = made.setdefault("components", {}).setdefault("schemas", {})
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        schemas |= definitions | {"Error": ERROR, "AnthropicError": ANTHROPIC_ERROR}
        for route in routes:
            operation = made["paths"].get(route.path, {}).get(route.method.lower())
            if operation is not None:
                _add_body(operation, route.body_class)
                _add_errors(operation["responses"], route.body_class or Body)
        return made


def _add_body(operation: dict[str, Any], body_class: type[Body] | None) -> None:
    if body_class is None:
        return
    schema = {"$ref": SCHEMAS + body_class.__name__}
    required = not body_class.may_be_absent
    operation["requestBody"] = {"required": required, "content": {"application/json": {"schema": schema}}}
    answer: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if "stream" in body_class.model_fields:
        answer["text/event-stream"] = {"schema": SSE_EVENT}
    operation["responses"]["200"] = {"description": "The answer.", "content": answer}


def _add_errors(responses: dict[str, Any], body_class: type[Body]) -> None:
    responses.pop("422", None)  # FastAPI's own validation, which no endpoint uses for bodies
    content = {"application/json": {"schema": {"$ref": SCHEMAS + body_class.error_schema}}}
    for status, description in ERROR_STATUSES.items():
        responses.setdefault(status, {"description": description, "content": content})
