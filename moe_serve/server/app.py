"""The endpoints. Each parses, submits, and answers whole or streamed; shapes live beside it.

Knows FastAPI and AsyncEngine; knows no scheduling and no tensors.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import PlainTextResponse, Response

from moe_serve.engine.async_engine import AsyncEngine
from moe_serve.errors import InvalidRequestError, ModelNotFoundError
from moe_serve.server.endpoints import chat, completions, dashboard, expert_plan, probes, ranks, recording, responses
from moe_serve.server.endpoints.answers import generation
from moe_serve.server.endpoints.answers.answer_merger import AnswerMerger
from moe_serve.server.endpoints.bodies import prompts
from moe_serve.server.endpoints.bodies.parsing import parse
from moe_serve.server.endpoints.bodies.sampling_body import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    ExpertCacheBody,
    SamplingBody,
    TokenizeBody,
)
from moe_serve.server.endpoints.chat import ChatShapes
from moe_serve.server.endpoints.completions import CompletionShapes
from moe_serve.server.endpoints.reference import openapi
from moe_serve.server.endpoints.reference.api_tables import ENDPOINTS
from moe_serve.server.monitoring.access_log import given_id
from moe_serve.server.monitoring.metrics import Metrics
from moe_serve.server.monitoring.request_spans import TraceRequests, Tracing
from moe_serve.server.monitoring.stats_log import StatsLog
from moe_serve.server.transport import http_errors
from moe_serve.text.response_templates import Template, template_of
from moe_serve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Service:
    """What the endpoints need, in one place instead of globals."""

    engine: AsyncEngine
    tokenizer: Tokenizer
    model_name: str
    model_path: str
    version: str
    sampling_defaults: Mapping[str, Any]
    metrics: Metrics
    started_s: int
    response_template: Template | None
    log_requests: bool = False
    """Prompts may be logged."""

    def check_model(self, name: str | None) -> None:
        if name not in (None, "", self.model_name, self.model_path):
            raise ModelNotFoundError(f"the model {name!r} does not exist; this server serves {self.model_name!r}")


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
    tracing: Tracing | None = None,
) -> FastAPI:
    """The ASGI application; starting it starts the engine's thread, stopping it drains."""
    pages = {"block_size": engine.engine.page_size, "num_gpu_blocks": engine.engine.num_pages}
    metrics = Metrics(model_name, pages, engine.engine.expert_report, engine.engine.config.experts.prefetch)
    engine.engine.observer = StatsLog(metrics) if log_stats else metrics
    service = Service(
        engine,
        tokenizer,
        model_name,
        model_path,
        version,
        sampling_defaults or {},
        metrics,
        int(time.time()),
        template_of(tokenizer),
        log_requests,
    )
    app = FastAPI(title="moe-serve", version=version, lifespan=lambda _: _lifespan(engine, drain_timeout_s, tracing))
    if tracing is not None:
        app.add_middleware(TraceRequests, tracing=tracing, model_name=model_name)
    app.state.engine = engine
    http_errors.install(app)
    _add_generation(app, service)
    responses.install(app, service)
    _add_tokenization(app, service)
    _add_operation(app, service)
    _add_information(app, service)
    ranks.install(app, engine.engine, metrics.registry)
    if with_dashboard:
        dashboard.install(app, service)
    probes.install(app, service)
    recording.install(app, service, Path(recording_dir) if recording_dir else None, recording_buffer_tokens)
    expert_plan.install(app, service)
    openapi.install(app, [*ENDPOINTS.values(), recording.RecordingBody])
    return app


@asynccontextmanager
async def _lifespan(engine: AsyncEngine, drain_timeout_s: float, tracing: Tracing | None) -> AsyncIterator[None]:
    engine.start()
    yield
    await engine.shutdown(drain_timeout_s)
    if tracing is not None:
        await asyncio.to_thread(tracing.close)


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", openapi_extra=openapi.takes(CompletionBody, streams=True))
    async def create_completion(http: HttpRequest) -> Response:
        body = await parse(http, CompletionBody)
        service.check_model(body.model)
        request_id = _request_id("cmpl", body, http)
        limit = service.engine.engine.max_model_len
        merger = AnswerMerger(
            completions.requests_of(body, request_id, service.tokenizer, service.sampling_defaults, limit)
        )
        shapes = CompletionShapes(body, request_id, service.model_name, service.tokenizer, merger)
        events = generation.chunks(service, body, merger, shapes) if body.stream else None
        return await generation.answer(service, http, merger, shapes.whole, events)

    @app.post("/v1/chat/completions", openapi_extra=openapi.takes(ChatBody, streams=True))
    async def create_chat_completion(http: HttpRequest) -> Response:
        body = await parse(http, ChatBody)
        service.check_model(body.model)
        request_id = _request_id("chatcmpl", body, http)
        limit = service.engine.engine.max_model_len
        defaults, template = service.sampling_defaults, service.response_template
        plan = chat.plan(body, request_id, service.tokenizer, template, defaults, limit)
        merger = AnswerMerger([plan.request])
        shapes = ChatShapes(body, plan, request_id, service.model_name, service.tokenizer, merger)
        events = generation.chunks(service, body, merger, shapes) if body.stream else None
        return await generation.answer(service, http, merger, shapes.whole, events)


def _request_id(prefix: str, body: SamplingBody, http: HttpRequest) -> str:
    return f"{prefix}-{body.request_id or given_id(http.headers) or uuid.uuid4().hex}"


def _add_tokenization(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", openapi_extra=openapi.takes(TokenizeBody))
    async def tokenize(http: HttpRequest) -> dict[str, Any]:
        body = await parse(http, TokenizeBody)
        service.check_model(body.model)
        ids = _tokenize(body, service.tokenizer)
        answer: dict[str, Any] = {
            "count": len(ids),
            "max_model_len": service.engine.engine.max_model_len,
            "tokens": ids,
        }
        if body.return_token_strs:
            answer["token_strs"] = [service.tokenizer.token_text(i) for i in ids]
        return answer

    @app.post("/detokenize", openapi_extra=openapi.takes(DetokenizeBody))
    async def detokenize(http: HttpRequest) -> dict[str, str]:
        body = await parse(http, DetokenizeBody)
        service.check_model(body.model)
        bad = next((t for t in body.tokens if t >= service.tokenizer.vocab_size), None)
        if bad is not None:
            raise InvalidRequestError("tokens", f"token id {bad} is outside the vocabulary")
        return {"prompt": service.tokenizer.decode(body.tokens, skip_special_tokens=False)}


def _tokenize(body: TokenizeBody, tokenizer: Tokenizer) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("prompt", "give exactly one of prompt and messages")
    if body.messages is not None:
        shown = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
        return prompts.render(body, body.messages, shown, tokenizer)
    return tokenizer.encode(body.prompt or "", body.add_special_tokens is not False)


def _add_operation(app: FastAPI, service: Service) -> None:
    @app.post("/moe_cache", openapi_extra=openapi.takes(ExpertCacheBody))
    async def resize_expert_cache(http: HttpRequest) -> dict[str, int]:
        """Change the memory for experts while serving; answers when it is done, between two steps."""
        body = await parse(http, ExpertCacheBody)
        await service.engine.call(lambda: service.engine.engine.resize_expert_cache(body.mib))
        return {"mib": body.mib}


def _add_information(app: FastAPI, service: Service) -> None:
    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": service.version}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type=service.metrics.content_type)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return _model_card(service)


def _model_card(service: Service) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.started_s,
        "owned_by": "moe-serve",
        "root": service.model_path,
        "parent": None,
        "max_model_len": service.engine.engine.max_model_len,
    }
