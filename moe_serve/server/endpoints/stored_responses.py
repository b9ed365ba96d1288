"""Stored responses by id: GET /v1/responses/{id}, its input items, and DELETE.

Knows FastAPI; what is kept, and for how long, is in response_store.py.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest

from moe_serve.server.endpoints.answers.generation import owner_of
from moe_serve.server.endpoints.bodies.given import TheResponses

router = APIRouter()


@router.get("/v1/responses/{response_id}")
async def stored_response(response_id: str, responses: TheResponses, http: HttpRequest) -> dict[str, Any]:
    """A stored response, as it was answered."""
    return responses.response(owner_of(http), response_id)


@router.get("/v1/responses/{response_id}/input_items")
async def input_items(response_id: str, responses: TheResponses, http: HttpRequest) -> dict[str, Any]:
    """What a stored response was the answer to, after the conversation before it."""
    items = responses.items(owner_of(http), response_id)
    return {"object": "list", "data": items, "first_id": None, "last_id": None, "has_more": False}


@router.delete("/v1/responses/{response_id}")
async def delete_response(response_id: str, responses: TheResponses, http: HttpRequest) -> dict[str, Any]:
    """Forget a stored response."""
    responses.delete(owner_of(http), response_id)
    return {"id": response_id, "object": "response", "deleted": True}
