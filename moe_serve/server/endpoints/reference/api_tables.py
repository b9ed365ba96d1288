"""docs/api.md's tables, made from the bodies that parse the requests: what is taken, ignored and refused.

`python docs/write_api.py` writes them; tests/server/test_api_doc.py holds the file against this.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from moe_serve.server.endpoints.bodies.parsing import Body
from moe_serve.server.endpoints.bodies.responses_body import ResponsesBody
from moe_serve.server.endpoints.bodies.sampling_body import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    ExpertCacheBody,
    TokenizeBody,
)
from moe_serve.server.endpoints.bodies.unsupported_fields import Refusal
from moe_serve.server.endpoints.expert_plan import ExpertPlanBody

ENDPOINTS: Mapping[str, type[Body]] = MappingProxyType(
    {
        "POST /v1/chat/completions": ChatBody,
        "POST /v1/completions": CompletionBody,
        "POST /v1/responses": ResponsesBody,
        "POST /tokenize": TokenizeBody,
        "POST /detokenize": DetokenizeBody,
        "POST /moe_cache": ExpertCacheBody,
        "POST /expert_plan": ExpertPlanBody,
    }
)
UNUSED = "Accepted and unused"


def tables() -> str:
    """Markdown: one table for each endpoint."""
    return "\n".join(f"## {name}\n\n{_table(body)}" for name, body in ENDPOINTS.items())


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
