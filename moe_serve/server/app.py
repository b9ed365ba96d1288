"""The application: endpoints found by listing their folder, and what they share.

Knows FastAPI and AsyncEngine; knows no endpoint by name, no scheduling and no tensors.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from moe_serve.engine.async_engine import AsyncEngine
from moe_serve.parallel.front.engine import ParallelEngine
from moe_serve.resolve import computing
from moe_serve.server import endpoints
from moe_serve.server.endpoints.reference import openapi
from moe_serve.server.monitoring.metrics import Metrics
from moe_serve.server.monitoring.request_spans import TraceRequests, Tracing
from moe_serve.server.monitoring.stats_log import StatsLog
from moe_serve.server.preparation import Preparation
from moe_serve.server.service import Service
from moe_serve.server.transport import http_errors
from moe_serve.text.parser_names import ParserNames
from moe_serve.text.tokenizer import Tokenizer


def create_app(
    engine: AsyncEngine,
    tokenizer: Tokenizer,
    *,
    model_name: str,
    model_path: str = "",
    version: str = "0",
    sampling_defaults: Mapping[str, Any] | None = None,
    drain_timeout_s: float = 5.0,
    log_requests: bool = False,
    log_stats: bool = False,
    with_dashboard: bool = True,
    recording_dir: str | None = None,
    recording_buffer_tokens: int = 65536,
    stored_responses_mib: int = 64,
    parsers: ParserNames | None = None,
    tracing: Tracing | None = None,
    ranks: ParallelEngine | None = None,
) -> FastAPI:
    """The ASGI application; starting it starts the engine's thread, stopping it drains.

    `ranks`: the same engine, where it runs over several devices.
    """
    metrics = _metrics_of(engine, model_name)
    engine.core.observer = StatsLog(metrics) if log_stats else metrics
    service = Service(
        engine=engine,
        tokenizer=tokenizer,
        metrics=metrics,
        preparation=Preparation(),
        model_name=model_name,
        model_path=model_path,
        version=version,
        sampling_defaults=sampling_defaults or {},
        log_requests=log_requests,
        with_dashboard=with_dashboard,
        recording_dir=Path(recording_dir) if recording_dir else None,
        recording_buffer_tokens=recording_buffer_tokens,
        stored_responses_mib=stored_responses_mib,
        parsers=parsers or ParserNames(),
        ranks=ranks,
    )
    app = FastAPI(title="moe-serve", version=version, lifespan=lambda _: _lifespan(service, drain_timeout_s, tracing))
    app.state.service = service
    if tracing is not None:
        app.add_middleware(TraceRequests, tracing=tracing, model_name=model_name)
    http_errors.install(app)
    _add_endpoints(app, service)
    openapi.install(app)
    return app


def _metrics_of(engine: AsyncEngine, model_name: str) -> Metrics:
    core = engine.core
    pages = {"block_size": core.page_size, "num_gpu_blocks": core.num_pages}
    return Metrics(model_name, pages, core.expert_report, core.config.experts.prefetch, computing(core.config))


@asynccontextmanager
async def _lifespan(service: Service, drain_timeout_s: float, tracing: Tracing | None) -> AsyncIterator[None]:
    service.engine.start()
    yield
    await service.engine.shutdown(drain_timeout_s)
    if tracing is not None:
        await asyncio.to_thread(tracing.close)


def _add_endpoints(app: FastAPI, service: Service) -> None:
    for module in endpoints.find():
        if hasattr(module, "add"):
            module.add(app, service)
        else:
            app.include_router(module.router)
