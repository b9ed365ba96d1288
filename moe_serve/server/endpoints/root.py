"""GET /: where to go from here. A browser is sent to the dashboard."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, RedirectResponse, Response

from moe_serve.server.endpoints.bodies.given import TheService

router = APIRouter()


@router.get("/")
async def root(service: TheService, http: HttpRequest) -> Response:
    """What is served and where; a browser is sent to the dashboard."""
    if service.with_dashboard and "text/html" in http.headers.get("accept", ""):
        return RedirectResponse("/dashboard")
    links = {"models": "/v1/models", "chat": "/v1/chat/completions", "api": "/docs", "health": "/health"}
    if service.with_dashboard:
        links["dashboard"] = "/dashboard"
    answer: dict[str, Any] = {"server": "moe-serve", "version": service.version, "model": service.model_name}
    return JSONResponse({**answer, "links": links})
