"""Full queues, clients that leave, steps that raise, and the end of the server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from moe_serve.config import EngineConfig
from tests.patience import PATIENCE_S

PATH = "/v1/completions"
LONG = {"prompt": "x", "max_tokens": 400}
SHORT = {"prompt": "x", "max_tokens": 3}


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.002)


class Visitor:
    """A client at the level of ASGI, which can hang up at any moment."""

    def __init__(self, app: Any, body: dict[str, Any], path: str = PATH) -> None:
        self.received = b""
        self._body: dict[str, Any] | None = {"type": "http.request", "body": json.dumps(body).encode()}
        self._gone = asyncio.Event()
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "method": "POST",
            "path": path,
        }
        scope |= {"query_string": b"", "headers": [], "server": ("test", 80), "scheme": "http", "http_version": "1.1"}
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        body, self._body = self._body, None
        if body is None:
            await self._gone.wait()
        return body or {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        self.received += message.get("body", b"")

    async def leave(self) -> None:
        self._gone.set()
        await asyncio.wait_for(self.task, PATIENCE_S)


def run(served: Any, scenario: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with served.running() as client:
            await scenario(client)

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_full_queue_is_503_with_retry_after(make: Any, stream: bool) -> None:
    served = make(config=EngineConfig.of(max_num_seqs=1, max_num_queued_reqs=1))

    async def scenario(client: Any) -> None:
        served.engine.gate.clear()
        accepted = [asyncio.create_task(client.post(PATH, json=SHORT)) for _ in range(2)]
        await until(lambda: served.async_engine.num_in_flight == 2)
        refused = await client.post(PATH, json={**SHORT, "stream": stream})
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "overloaded_error"
        served.engine.gate.set()
        assert [(await a).status_code for a in accepted] == [200, 200]
        assert (await client.post(PATH, json=SHORT)).status_code == 200
        metrics = (await client.get("/metrics")).text
        assert 'admission_rejections_total{engine="0",model_name="fake-model",reason="overloaded"} 1.0' in metrics

    run(served, scenario)


@pytest.mark.parametrize(("path", "kind"), [(PATH, "rate_limit_error"), ("/v1/messages", "rate_limit_error")])
def test_one_client_has_only_so_many_requests_in_flight(make: Any, path: str, kind: str) -> None:
    served = make(config=EngineConfig.of(max_concurrent_per_client=2))
    bodies = {PATH: SHORT, "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3}}

    async def scenario(client: Any) -> None:
        served.engine.gate.clear()
        two = asyncio.create_task(client.post(PATH, json={**SHORT, "prompt": ["x", "y"]}))
        await until(lambda: served.async_engine.num_in_flight == 2)
        refused = await client.post(path, json=bodies[path])
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == kind
        served.engine.gate.set()
        assert (await two).status_code == 200
        assert (await client.post(path, json=bodies[path])).status_code == 200
        assert 'reason="rate_limit"} 1.0' in (await client.get("/metrics")).text

    run(served, scenario)


def test_queued_prompt_tokens_are_limited(make: Any) -> None:
    served = make(config=EngineConfig.of(max_num_seqs=1, max_num_queued_tokens=10))

    async def scenario(client: Any) -> None:
        served.engine.gate.clear()
        first = asyncio.create_task(client.post(PATH, json=SHORT))
        await until(lambda: served.async_engine.num_in_flight == 1)
        assert (await client.post(PATH, json={"prompt": [5] * 11})).status_code == 503
        served.engine.gate.set()
        assert (await first).status_code == 200

    run(served, scenario)


def test_part_of_a_body_that_finds_the_queue_full_takes_the_rest_along(make: Any) -> None:
    served = make(config=EngineConfig.of(max_num_seqs=1, max_num_queued_reqs=1), delay_s=0.005)

    async def scenario(client: Any) -> None:
        assert (await client.post(PATH, json={**LONG, "prompt": ["a", "b", "c"]})).status_code == 503
        await until(lambda: not served.engine.has_work())
        assert served.async_engine.num_in_flight == 0

    run(served, scenario)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["x", ["x", "y"]])
@pytest.mark.parametrize("started", [False, True])
def test_client_that_leaves_is_aborted_at_once(make: Any, stream: bool, prompt: Any, started: bool) -> None:
    served = make(delay_s=0.002)

    async def scenario(client: Any) -> None:
        if not started:
            served.engine.gate.clear()
        visitor = Visitor(served.app, {**LONG, "prompt": prompt, "stream": stream, "n": 2})
        count = 1 if prompt == "x" else 2
        await until(lambda: served.async_engine.num_in_flight == count)
        if started:
            await until(lambda: served.engine.running and (visitor.received or not stream))
        await visitor.leave()
        assert served.async_engine.num_in_flight == 0
        served.engine.gate.set()
        await until(lambda: len(served.engine.aborted) == count)
        await until(lambda: not served.engine.has_work())
        assert not served.engine.finished
        assert (await client.post(PATH, json=SHORT)).status_code == 200

    run(served, scenario)


def test_failed_step_is_500_for_its_requests_and_no_one_else(served: Any) -> None:
    async def scenario(client: Any) -> None:
        served.engine.failing_steps = 1
        failed = await client.post(PATH, json=SHORT)
        assert failed.status_code == 500
        assert failed.json()["error"]["type"] == "internal_error"
        assert "RuntimeError" in failed.json()["error"]["message"]
        assert (await client.post(PATH, json=SHORT)).status_code == 200
        assert (await client.get("/health")).status_code == 200

    run(served, scenario)


def test_waiting_requests_survive_a_failed_step(make: Any) -> None:
    served = make(config=EngineConfig.of(max_num_seqs=1))

    async def scenario(client: Any) -> None:
        served.engine.gate.clear()
        posts = [asyncio.create_task(client.post(PATH, json=SHORT)) for _ in range(3)]
        await until(lambda: served.async_engine.num_in_flight == 3)
        served.engine.failing_steps = 1
        served.engine.gate.set()
        assert sorted([(await p).status_code for p in posts]) == [200, 200, 500]

    run(served, scenario)


def test_step_that_fails_mid_stream_is_an_error_event_then_done(make: Any) -> None:
    served = make(delay_s=0.002)

    async def scenario(client: Any) -> None:
        visitor = Visitor(served.app, {**LONG, "stream": True})
        await until(lambda: visitor.received)
        served.engine.failing_steps = 1
        await asyncio.wait_for(visitor.task, PATIENCE_S)
        *_, error, done, end = visitor.received.decode().split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == 500
        assert (await client.post(PATH, json=SHORT)).status_code == 200

    run(served, scenario)


def test_three_failed_steps_in_a_row_end_the_engine(served: Any) -> None:
    async def scenario(client: Any) -> None:
        served.engine.failing_steps = 100
        for _ in range(3):
            assert (await client.post(PATH, json=SHORT)).status_code == 500
        await until(lambda: served.async_engine.state == "dead")
        health = await client.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "dead"})
        for stream in (False, True):
            refused = await client.post(PATH, json={**SHORT, "stream": stream})
            assert refused.status_code == 503
            assert refused.json()["error"]["type"] == "engine_dead_error"

    run(served, scenario)


def test_two_failures_with_a_good_step_between_do_not(served: Any) -> None:
    async def scenario(client: Any) -> None:
        for _ in range(3):
            served.engine.failing_steps = 2
            for _ in range(2):
                assert (await client.post(PATH, json=SHORT)).status_code == 500
            assert (await client.post(PATH, json=SHORT)).status_code == 200

    run(served, scenario)


def test_request_the_engine_cannot_take_fails_alone(served: Any) -> None:
    async def scenario(client: Any) -> None:
        served.engine.refuse_add = True
        served.engine.gate.clear()
        posts = [asyncio.create_task(client.post(PATH, json=SHORT)) for _ in range(4)]
        await until(lambda: served.async_engine.num_in_flight >= 3)
        served.engine.gate.set()
        assert sorted([(await p).status_code for p in posts]) == [200, 200, 200, 500]

    run(served, scenario)


def test_abort_that_raises_loses_no_other_command(make: Any) -> None:
    served = make(refuse_abort=True, delay_s=0.002)

    async def scenario(client: Any) -> None:
        visitor = Visitor(served.app, {**LONG, "stream": True})
        await until(lambda: visitor.received)
        served.engine.gate.clear()  # so that abort and the next request come in one batch
        await asyncio.sleep(0.01)
        await visitor.leave()
        post = asyncio.create_task(client.post(PATH, json=SHORT))
        await until(lambda: served.async_engine.num_in_flight == 1)
        served.engine.gate.set()
        assert (await asyncio.wait_for(post, PATIENCE_S)).status_code == 200

    run(served, scenario)


def test_error_in_error_handling_ends_the_engine_instead_of_hanging(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(client: Any) -> None:
        monkeypatch.setattr(served.engine, "fail_running", lambda message: 1 / 0)
        served.engine.failing_steps = 1
        assert (await asyncio.wait_for(client.post(PATH, json=SHORT), PATIENCE_S)).status_code == 503
        assert (await client.get("/health")).status_code == 503

    run(served, scenario)


def test_shutdown_lets_requests_finish_and_refuses_new_ones(make: Any) -> None:
    served = make(delay_s=0.01)

    async def scenario(client: Any) -> None:
        running = asyncio.create_task(client.post(PATH, json={**SHORT, "max_tokens": 20}))
        await until(lambda: served.engine.running)
        end = asyncio.create_task(served.async_engine.shutdown(PATIENCE_S))
        await asyncio.sleep(0)
        refused = await client.post(PATH, json=SHORT)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")
        assert (await client.get("/health")).json() == {"status": "draining"}
        assert (await running).json()["usage"]["completion_tokens"] == 20
        await end
        assert served.async_engine.state == "stopped"

    run(served, scenario)


def test_shutdown_ends_what_does_not_finish_in_time(make: Any) -> None:
    served = make(delay_s=0.01)

    async def scenario(client: Any) -> None:
        running = asyncio.create_task(client.post(PATH, json=LONG))
        await until(lambda: served.engine.running)
        await asyncio.wait_for(served.async_engine.shutdown(0.05), PATIENCE_S)
        assert (await running).status_code == 503
        assert len(served.engine.aborted) >= 1

    run(served, scenario)
