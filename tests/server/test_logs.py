"""Log lines: one per request with its id, JSON where asked for, and prompts only where asked for."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import httpx
import pytest

from moe_serve.config import ServerConfig
from moe_serve.scheduling.stats import EngineLoad, StepStats
from moe_serve.server.monitoring import stats_log
from moe_serve.server.monitoring.logs import FIELDS, JsonFormatter, TextFormatter
from moe_serve.server.monitoring.stats_log import StatsLog
from moe_serve.server.transport.guard import guard, warn_if_open

SECRET = "The quick brown"


def _talk(served: Any, *calls: tuple[str, Any]) -> list[httpx.Response]:
    async def run() -> list[httpx.Response]:
        async with served.app.router.lifespan_context(served.app):
            transport = httpx.ASGITransport(guard(served.app, ServerConfig(), frozenset()))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                headers = {"X-Request-Id": "mine"}
                return [
                    await (client.get(path) if body is None else client.post(path, json=body, headers=headers))
                    for path, body in calls
                ]

    return asyncio.run(run())


def _records(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [getattr(r, FIELDS) for r in caplog.records if hasattr(r, FIELDS)]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_one_line_with_its_id_and_counts(
    served: Any, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    caplog.set_level(logging.INFO)
    answer = _talk(served, ("/v1/completions", {"prompt": SECRET, "max_tokens": 3, "stream": stream}))[0]
    (line,) = _records(caplog)
    assert line["request_id"] == answer.headers["x-request-id"] == "cmpl-mine"
    assert (line["status"], line["path"], line["completion_tokens"]) == (200, "/v1/completions", 3)
    assert line["prompt_tokens"] > 1
    assert SECRET not in caplog.text


def test_refusals_carry_an_id_too(served: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    answers = _talk(served, ("/v1/completions", {"prompt": SECRET, "temperature": -1}), ("/nowhere", {}))
    assert [line["status"] for line in _records(caplog)] == [400, 404]
    assert [answer.headers["x-request-id"] for answer in answers] == ["mine", "mine"]
    assert SECRET not in caplog.text


def test_probes_are_not_logged(served: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    paths = ("/health", "/live", "/ping", "/load", "/metrics", "/dashboard/data")
    answers = _talk(served, *((path, None) for path in paths))
    assert [answer.status_code for answer in answers] == [200] * 6
    assert answers[3].json() == {"server_load": 0, "num_queued": 0}
    assert _records(caplog) == []


def test_prompts_are_logged_where_asked_for(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    served = make(app_log_requests=True)
    _talk(served, ("/v1/completions", {"prompt": SECRET, "max_tokens": 3}))
    prompt, _ = _records(caplog)
    assert prompt["prompt"] == SECRET
    assert "max_tokens=3" in prompt["params"]


def _record(message: str, error: BaseException | None = None, **fields: Any) -> logging.LogRecord:
    info = (type(error), error, None) if error else None
    record = logging.LogRecord("moe_serve", logging.INFO, __file__, 1, message, (), info)
    setattr(record, FIELDS, fields)
    return record


def test_json_lines_are_whole_objects() -> None:
    line = JsonFormatter().format(_record("a\nb", ValueError("no"), path='/x\n"', status=200))
    assert "\n" not in line
    parsed = json.loads(line)
    assert (parsed["message"], parsed["path"], parsed["status"], parsed["level"]) == ("a\nb", '/x\n"', 200, "info")
    assert "ValueError: no" in parsed["traceback"]


def test_text_lines_cannot_be_forged() -> None:
    line = TextFormatter("%(message)s").format(_record("request", path="/x\n2026 ERROR forged", status=200))
    assert line == "request path='/x\\n2026 ERROR forged' status=200"


def test_throughput_is_a_line_every_ten_seconds(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    now = 0.0

    class Nobody:
        seen = 0

        def on_step(self, stats: StepStats) -> None:
            self.seen += 1

        def on_load(self, load: EngineLoad) -> None: ...
        def on_finished(self, stats: Any) -> None: ...

        def on_aborted(self, num_samples: int) -> None: ...

    nobody = Nobody()
    observer = StatsLog(nobody, lambda: now)
    for step in range(25):
        now = float(step)
        observer.on_step(StepStats(1.0, 100, 4, 0, 0, 0, (), ()))
        observer.on_load(EngineLoad(4, 2, 0.5))
    assert nobody.seen == 25
    lines = _records(caplog)
    assert len(lines) == 2
    assert lines[1] == {
        "prompt_tokens_per_s": 100.0,
        "generated_tokens_per_s": 4.0,
        "running": 4,
        "waiting": 2,
        "kv_usage_perc": 50.0,
    }
    assert stats_log.INTERVAL_S == 10


@pytest.mark.parametrize(
    ("host", "keys", "warned"),
    [
        ("127.0.0.1", (), False),
        ("::1", (), False),
        ("localhost", (), False),
        ("0.0.0.0", (), True),
        ("10.0.0.5", (), True),
        ("example.org", (), True),
        ("0.0.0.0", ("k",), False),
    ],
)
def test_an_open_door_is_pointed_out(
    caplog: pytest.LogCaptureFixture, host: str, keys: tuple[str, ...], warned: bool
) -> None:
    warn_if_open(ServerConfig(host=host), frozenset(keys))
    assert ("without an API key" in caplog.text) == warned
