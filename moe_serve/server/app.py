"""The endpoints. Each parses, submits, and answers whole or streamed; shapes live beside it.

Knows FastAPI and AsyncEngine; knows no scheduling and no tensors.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from moe_serve.async_engine import AsyncEngine, EngineState
from moe_serve.errors import EngineDeadError, InvalidRequestError, ModelNotFoundError, MoEServeError, OverloadedError
from moe_serve.sequence import Request, SamplingParams
from moe_serve.server import chat, completions, http_errors, ranks, sse
from moe_serve.server.chat import ChatShapes
from moe_serve.server.collect import Merger, collect, stream, unless_disconnected
from moe_serve.server.completions import CompletionShapes
from moe_serve.server.metrics import Metrics
from moe_serve.server.parsing import parse
from moe_serve.server.protocol import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    ExpertCacheBody,
    SamplingBody,
    TokenizeBody,
)
from moe_serve.tokenizer import Tokenizer


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
) -> FastAPI:
    """The ASGI application; starting it starts the engine's thread, stopping it drains."""
    pages = {"block_size": engine.engine.block_size, "num_gpu_blocks": engine.engine.num_pages}
    metrics = Metrics(model_name, pages)
    engine.engine.observer = metrics
    service = Service(
        engine, tokenizer, model_name, model_path, version, sampling_defaults or {}, metrics, int(time.time())
    )
    app = FastAPI(title="moe-serve", version=version, lifespan=lambda _: _lifespan(engine, drain_timeout_s))
    http_errors.install(app)
    _add_generation(app, service)
    _add_tokenization(app, service)
    _add_operation(app, service)
    _add_information(app, service)
    ranks.install(app, engine.engine, metrics.registry)
    return app


@asynccontextmanager
async def _lifespan(engine: AsyncEngine, drain_timeout_s: float) -> AsyncIterator[None]:
    engine.start()
    yield
    await engine.shutdown(drain_timeout_s)


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions")
    async def create_completion(http: HttpRequest) -> Response:
        body = await parse(http, CompletionBody)
        service.check_model(body.model)
        completions.check(body)
        params = body.sampling_params(service.sampling_defaults, body.max_tokens, body.logprobs)
        request_id = _request_id("cmpl", body, http)
        prompts = completions.prompts_of(body, service.tokenizer)
        merger = Merger([_request(request_id, i, p, params) for i, p in enumerate(prompts)])
        shapes = CompletionShapes(body, request_id, service.model_name, service.tokenizer, merger)
        return await _answer(service, http, body, merger, shapes)

    @app.post("/v1/chat/completions")
    async def create_chat_completion(http: HttpRequest) -> Response:
        body = await parse(http, ChatBody)
        service.check_model(body.model)
        body.check_stream_options()
        params = body.sampling_params(service.sampling_defaults, body.completion_limit(), body.num_logprobs())
        request_id = _request_id("chatcmpl", body, http)
        prompt = chat.render(
            body.messages,
            service.tokenizer,
            body.add_generation_prompt,
            body.continue_final_message,
            body.chat_template_kwargs,
        )
        merger = Merger([_request(request_id, 0, prompt, params)])
        shapes = ChatShapes(body, request_id, service.model_name, service.tokenizer, merger)
        return await _answer(service, http, body, merger, shapes)


def _request_id(prefix: str, body: SamplingBody, http: HttpRequest) -> str:
    given = body.request_id or http.headers.get("x-request-id", "")[:200]
    if not given.isascii() or not given.isprintable():
        given = ""
    return f"{prefix}-{given or uuid.uuid4().hex}"


def _request(request_id: str, position: int, prompt: tuple[int, ...], params: SamplingParams) -> Request:
    return Request(f"{request_id}-{position}" if position else request_id, prompt, params, time.monotonic())


async def _answer(
    service: Service, http: HttpRequest, body: SamplingBody, merger: Merger, shapes: CompletionShapes | ChatShapes
) -> Response:
    for request in merger.requests:  # refuse the whole body before any part of it runs
        service.engine.engine.check_request(request)
    headers = {"X-Request-Id": merger.requests[0].request_id}
    try:
        if not body.stream:
            choices = await unless_disconnected(http, collect(service.engine, merger))
            return JSONResponse(shapes.whole(choices), headers=headers)
        events = _stream_events(service, body, merger, shapes)
        # Wait for the first output: until then an overload or a dead engine is still an HTTP status.
        first = await unless_disconnected(http, anext(events))
    except (OverloadedError, EngineDeadError) as error:
        service.metrics.on_rejected(error.error_type.removesuffix("_error"))
        raise
    return sse.EventStream(first, events, headers)


async def _stream_events(
    service: Service, body: SamplingBody, merger: Merger, shapes: CompletionShapes | ChatShapes
) -> AsyncGenerator[bytes]:
    """SSE bytes of one answer. Errors before the first output raise; later ones become an event."""
    options = body.stream_options
    started = False
    try:
        async with aclosing(stream(service.engine, merger)) as outputs:
            async for index, output in outputs:
                if output.error is not None:
                    raise MoEServeError(output.error)
                head = [] if started else shapes.first_chunks()
                started = True
                chunk = shapes.chunk(index, output)
                if chunk is not None and options is not None and options.continuous_usage_stats:
                    chunk["usage"] = merger.usage.as_json()
                if head or chunk is not None:
                    yield sse.events([*head, *([] if chunk is None else [chunk])])
    except MoEServeError as error:
        if not started:
            raise
        yield sse.event(http_errors.error_body(error))
    else:
        if options is not None and options.include_usage:
            yield sse.event(shapes.usage_chunk(merger.usage))
    yield sse.DONE


def _add_tokenization(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize")
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

    @app.post("/detokenize")
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
        kwargs = body.chat_template_kwargs
        return list(
            chat.render(body.messages, tokenizer, body.add_generation_prompt, body.continue_final_message, kwargs)
        )
    return tokenizer.encode(body.prompt or "", body.add_special_tokens is not False)


def _add_operation(app: FastAPI, service: Service) -> None:
    @app.post("/moe_cache")
    async def resize_expert_cache(http: HttpRequest) -> dict[str, int]:
        """Change the memory for experts while serving; answers when it is done, between two steps."""
        body = await parse(http, ExpertCacheBody)
        await service.engine.resize_expert_cache(body.mib)
        return {"mib": body.mib}


def _add_information(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        """200 while requests are served, 503 while draining or dead."""
        state = service.engine.state
        trouble = ranks.trouble_of(service.engine.engine)
        if trouble is not None and state is EngineState.READY:
            return JSONResponse(trouble, 503)
        return JSONResponse({"status": state}, 200 if state is EngineState.READY else 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": service.version}

    @app.get("/metrics")
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
