"""docs/api.md's tables, made from the bodies that parse the requests: what is taken, ignored and refused.

`python docs/write_api.py` writes them; tests/server/test_api_doc.py holds the file against this.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from moe_serve.server.endpoints.bodies.parsing import Body
from moe_serve.server.endpoints.bodies.unsupported_fields import Refusal
from moe_serve.server.endpoints.reference.described import DescribedRoute, described_routes

UNUSED = "Accepted and unused"


def tables() -> str:
    """Markdown: all endpoints, then one table for each that takes a body."""
    routes = described_routes()
    with_body = [route for route in routes if route.body_class is not None]
    return "\n".join([_overview(routes), *(_section(route) for route in with_body)])


def _overview(routes: list[DescribedRoute]) -> str:
    rows = [f"| `{route.method} {route.path}` | {route.summary} |" for route in routes]
    return "\n".join(["## All endpoints", "", "| Endpoint | |", "|---|---|", *rows]) + "\n"


def _section(route: DescribedRoute) -> str:
    assert route.body_class is not None
    return f"## {route.method} {route.path}\n\n{_table(route.body_class)}"


def _table(body: type[Body]) -> str:
    rows = ["| Field | State | |", "|---|---|---|", *_rows(body)]
    return "\n".join(rows) + "\n"


def _rows(body: type[Body]) -> Iterator[str]:
    for name, field in sorted(body.model_fields.items(), key=lambda item: not item[1].is_required()):
        text = " ".join((field.description or "").split()).replace("|", "\\|")
        state = "unused" if text.startswith(UNUSED) else "supported"
        yield f"| `{name}` | {state}{', required' if field.is_required() else ''} | {text} |"
    for name, refusal in body.unsupported.items():
        state = "refused for now" if refusal.is_planned else "not planned"
        yield f"| `{name}` | {state} | {_refusal(refusal).strip()} |"


def _refusal(refusal: Refusal) -> str:
    values = ", ".join(dict.fromkeys(f"`{json.dumps(value)}`" for value in refusal.harmless if value is not None))
    why = refusal.why[0].upper() + refusal.why[1:]
    return f"{why}. " + (f"Harmless and accepted: {values}." if values else "")
