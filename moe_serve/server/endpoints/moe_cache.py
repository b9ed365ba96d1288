"""POST /moe_cache: change the memory for experts while serving."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from pydantic import Field

from moe_serve.server.endpoints.bodies.given import TheService, parsed
from moe_serve.server.endpoints.bodies.json_types import Int
from moe_serve.server.endpoints.bodies.parsing import Body

router = APIRouter()


class ExpertCacheBody(Body):
    """POST /moe_cache."""

    mib: Annotated[Int, Field(ge=1)]
    """Memory for experts, as --moe-cache-mib."""


@router.post("/moe_cache")
async def resize_expert_cache(
    body: Annotated[ExpertCacheBody, Depends(parsed(ExpertCacheBody))], service: TheService
) -> dict[str, int]:
    """Change the memory for experts while serving; answers when it is done, between two steps."""
    await service.engine.call(lambda: service.engine.core.resize_expert_cache(body.mib))
    return {"mib": body.mib}
