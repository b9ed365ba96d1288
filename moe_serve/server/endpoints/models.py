"""What is served: GET /v1/models, GET /v1/models/{name} and GET /version."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from moe_serve.resolve import computing
from moe_serve.server.endpoints.bodies.given import TheService

router = APIRouter()


@router.get("/v1/models")
async def models(service: TheService) -> dict[str, Any]:
    """The served model, as a list of one."""
    return {"object": "list", "data": [_card(service)]}


@router.get("/v1/models/{name:path}")
async def model(name: str, service: TheService) -> dict[str, Any]:
    """The served model, by its name or path."""
    if not name:
        return await models(service)
    service.check_model(name)
    return _card(service)


@router.get("/version")
async def version(service: TheService) -> dict[str, str]:
    """The version of moe-serve, and how it computes: device, dtype, instruction set, threads."""
    return {"version": service.version, **computing(service.engine.core.config)}


def _card(service: TheService) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.started_s,
        "owned_by": "moe-serve",
        "root": service.model_path,
        "parent": None,
        "max_model_len": service.max_model_len,
    }
