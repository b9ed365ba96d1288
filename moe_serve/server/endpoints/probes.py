"""What machines ask: GET /health, /ping, /live, /load and /metrics, under Kubernetes' and vLLM's names."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from moe_serve.engine.async_engine import EngineState
from moe_serve.server.endpoints.bodies.given import TheService

router = APIRouter()


@router.get("/health")
@router.get("/ping")
@router.post("/ping")
async def health(service: TheService) -> Response:
    """200 while requests are served; 503 while loading, draining, dead or short of ranks, and which of these."""
    engine = service.engine
    trouble = engine.core.trouble()
    if trouble is not None and engine.state is EngineState.READY:
        return JSONResponse({"status": trouble.status, "error": trouble.message}, 503)
    cause = {} if engine.cause is None else {"error": engine.cause}
    return JSONResponse({"status": engine.state, **cause}, 200 if engine.state is EngineState.READY else 503)


@router.get("/live")
async def live(service: TheService) -> Response:
    """503 only when a restart would help."""
    state = service.engine.state
    return JSONResponse({"status": state}, 503 if state is EngineState.DEAD else 200)


@router.get("/load")
async def load(service: TheService) -> dict[str, Any]:
    """Requests in flight and queued: what balancers of load ask for."""
    return {"server_load": service.engine.num_in_flight, "num_queued": service.engine.num_queued}


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(service: TheService, http: HttpRequest) -> Response:
    """Prometheus metrics; docs/metrics.md lists them."""
    service.metrics.http.counts = getattr(http.state, "http_counts", service.metrics.http.counts)
    return Response(await service.metrics.scrape.text(), media_type=service.metrics.content_type)
