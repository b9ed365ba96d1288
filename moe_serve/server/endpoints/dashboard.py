"""The page at /dashboard, its files, and the numbers it draws.

Everything comes from this server and nothing from elsewhere, which the Content-Security-Policy holds
the browser to. The numbers show no prompt and no answer. Knows FastAPI; knows no engine.
"""

from __future__ import annotations

import time
from pathlib import Path

from fastapi import APIRouter, FastAPI, HTTPException
from fastapi.responses import JSONResponse, Response

from moe_serve.server.endpoints.bodies.given import TheService
from moe_serve.server.monitoring.overview import overview

router = APIRouter(include_in_schema=False)

STATIC = Path(__file__).parents[1] / "static"
MEDIA_TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


FILES = {path.name: path for path in STATIC.iterdir() if path.suffix in MEDIA_TYPES}


def add(app: FastAPI, service: TheService) -> None:
    """The page's routes, where it is wanted. They are its own: not part of the documented API."""
    if service.with_dashboard:
        app.include_router(router)


@router.get("/dashboard")
async def page() -> Response:
    """The live page, in a browser."""
    return _file(FILES["index.html"])


@router.get("/dashboard/data")
async def data(service: TheService) -> Response:
    """The numbers that the page draws."""
    engine = service.engine
    about = {
        "model": service.model_name,
        "version": service.version,
        "state": engine.state,
        "uptime_s": time.time() - service.started_s,
        "max_model_len": service.max_model_len,
    }
    return JSONResponse(about | overview(engine, service.metrics.live), headers=HEADERS)


@router.get("/dashboard/{name}")
async def file(name: str) -> Response:
    """A script, style or picture of the page."""
    if name not in FILES:
        raise HTTPException(404, f"the dashboard has no file {name!r}")
    return _file(FILES[name])


def _file(path: Path) -> Response:
    return Response(path.read_bytes(), media_type=MEDIA_TYPES[path.suffix], headers=HEADERS)
