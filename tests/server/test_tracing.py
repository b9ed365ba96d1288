"""Spans: what they say of a request, whose children they are, and that they reach a collector."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from moe_serve.config import ServerConfig
from moe_serve.engine.async_engine import AsyncEngine
from moe_serve.errors import ConfigError
from moe_serve.server.app import create_app
from moe_serve.server.monitoring.otlp import OtlpTracing
from moe_serve.server.run import _tracing as tracing_of
from moe_serve.text.tokenizer import Tokenizer
from tests.random_model import random_engine

SECRET = "The quick brown"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(spans: InMemorySpanExporter) -> OtlpTracing:
    return OtlpTracing(SimpleSpanProcessor(spans))


def _ask(tracing: OtlpTracing, tokenizer: Tokenizer, headers: dict[str, str], body: dict[str, Any]) -> int:
    """The status of one request to a real engine with a random model."""
    engine = random_engine(tokenizer, max_model_len=512, num_kv_pages=64)
    app = create_app(AsyncEngine(engine), tokenizer, model_name="tiny", tracing=tracing)

    async def run() -> int:
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return (await client.post("/v1/completions", json=body, headers=headers)).status_code

    return asyncio.run(run())


def _one(spans: InMemorySpanExporter) -> ReadableSpan:
    (span,) = spans.get_finished_spans()
    return span


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_one_span_with_its_counts_and_times(
    spans: InMemorySpanExporter, tracing: OtlpTracing, tokenizer: Tokenizer, stream: bool
) -> None:
    body = {"prompt": [SECRET, SECRET + " fox"], "max_tokens": 5, "ignore_eos": True, "n": 2, "stream": stream}
    assert _ask(tracing, tokenizer, {"X-Request-Id": "mine"}, body) == 200
    span = _one(spans)
    assert span.attributes is not None
    found = dict(span.attributes)
    assert (span.name, span.kind, span.parent, span.status.status_code) == (
        "llm_request",
        SpanKind.SERVER,
        None,
        StatusCode.UNSET,
    )
    assert span.resource.attributes["service.name"] == "moe-serve"
    num_prompt = len(tokenizer.encode(SECRET)) + len(tokenizer.encode(SECRET + " fox"))
    assert {name: found[name] for name in found if "latency" not in name} == {
        "gen_ai.request.id": "cmpl-mine",
        "gen_ai.response.model": "tiny",
        "gen_ai.request.n": 2,
        "gen_ai.request.temperature": 1.0,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.max_tokens": 5,
        "gen_ai.usage.num_sequences": 4,
        "gen_ai.usage.prompt_tokens": num_prompt,
        "gen_ai.usage.completion_tokens": 20,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.response.finish_reasons": ("length",) * 4,
        "http.response.status_code": 200,
    }
    assert SECRET not in span.to_json()


def test_times_add_up(spans: InMemorySpanExporter, tracing: OtlpTracing, tokenizer: Tokenizer) -> None:
    _ask(tracing, tokenizer, {}, {"prompt": SECRET, "max_tokens": 8, "ignore_eos": True})
    span = _one(spans)
    assert span.attributes is not None
    assert span.start_time is not None
    assert span.end_time is not None
    prefix = "gen_ai.latency."
    s = {k.removeprefix(prefix): float(v) for k, v in span.attributes.items() if k.startswith(prefix)}  # type: ignore[arg-type]
    assert s["time_in_queue"] >= 0
    assert s["time_in_model_prefill"] > 0
    assert s["time_in_model_decode"] > 0
    assert s["time_to_first_token"] == pytest.approx(s["time_in_queue"] + s["time_in_model_prefill"])
    assert s["time_in_model_inference"] == pytest.approx(s["time_in_model_prefill"] + s["time_in_model_decode"])
    assert s["time_to_first_token"] + s["time_in_model_decode"] <= s["e2e"] <= (span.end_time - span.start_time) / 1e9


def test_a_callers_span_is_the_parent(spans: InMemorySpanExporter, tracing: OtlpTracing, tokenizer: Tokenizer) -> None:
    _ask(tracing, tokenizer, {"traceparent": f"00-{TRACE}-{PARENT}-01"}, {"prompt": SECRET, "max_tokens": 2})
    span = _one(spans)
    assert span.parent is not None
    assert span.context is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)


def test_a_caller_that_did_not_sample_is_followed(
    spans: InMemorySpanExporter, tracing: OtlpTracing, tokenizer: Tokenizer
) -> None:
    _ask(tracing, tokenizer, {"traceparent": f"00-{TRACE}-{PARENT}-00"}, {"prompt": SECRET, "max_tokens": 2})
    assert spans.get_finished_spans() == ()


def test_a_failure_is_an_error_span(make: Any, spans: InMemorySpanExporter, tracing: OtlpTracing) -> None:
    served = make(failing_steps=1, app_tracing=tracing)
    assert served.talk(("/v1/completions", {"prompt": SECRET, "max_tokens": 2}))[0].status_code == 500
    span = _one(spans)
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes is not None
    assert (span.attributes["error.type"], span.attributes["http.response.status_code"]) == ("500", 500)


def test_other_requests_are_no_spans(make: Any, spans: InMemorySpanExporter, tracing: OtlpTracing) -> None:
    served = make(app_tracing=tracing)
    served.talk(("/health", None), ("/v1/completions", {"prompt": SECRET, "temperature": -1}), ("/metrics", None))
    assert spans.get_finished_spans() == ()


class _Collector(BaseHTTPRequestHandler):
    received: list[tuple[str, ExportTraceServiceRequest]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.received.append((self.path, ExportTraceServiceRequest.FromString(body)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[tuple[str, ExportTraceServiceRequest]]]]:
    """Its URL, and what it has received."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    received: list[tuple[str, ExportTraceServiceRequest]] = []
    with HTTPServer(("127.0.0.1", 0), type("Handler", (_Collector,), {"received": received})) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", received
        server.shutdown()
        thread.join()


def test_spans_reach_a_collector(make: Any, collector: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "chat-eu")
    url, received = collector
    tracing = tracing_of(ServerConfig(otlp_traces_endpoint=url))
    make(app_tracing=tracing).post("/v1/completions", prompt=SECRET, max_tokens=2)  # stopping it sends what is left
    ((path, sent),) = received
    assert path == "/v1/traces"
    resource = {a.key: a.value.string_value for a in sent.resource_spans[0].resource.attributes}
    assert resource["service.name"] == "chat-eu"
    assert [span.name for span in sent.resource_spans[0].scope_spans[0].spans] == ["llm_request"]


def test_it_is_off_without_an_endpoint() -> None:
    assert tracing_of(ServerConfig()) is None


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    monkeypatch.delitem(sys.modules, "moe_serve.server.monitoring.otlp")
    with pytest.raises(ConfigError, match=r"pip install 'moe-serve-engine\[otel\]'"):
        tracing_of(ServerConfig(otlp_traces_endpoint="http://localhost:4318/v1/traces"))


def test_only_http_is_spoken() -> None:
    with pytest.raises(ConfigError, match="otlp-traces-endpoint"):
        tracing_of(ServerConfig(otlp_traces_endpoint="grpc://localhost:4317"))
