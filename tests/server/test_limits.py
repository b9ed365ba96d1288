"""What a request may take: bytes, tokens, time in the queue and time in all."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import pytest

from moe_serve.config import EngineConfig, ServerConfig
from moe_serve.errors import ConfigError, OverloadedError
from moe_serve.scheduling.admission import Admission
from moe_serve.server.transport.guard import guard
from tests.patience import PATIENCE_S, on_a_quiet_moment

PATH = "/v1/completions"


def _post(served: Any, config: ServerConfig, content: Any, headers: dict[str, str] | None = None) -> httpx.Response:
    async def run() -> httpx.Response:
        async with served.app.router.lifespan_context(served.app):
            transport = httpx.ASGITransport(guard(served.app, config, frozenset()), raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await client.post(PATH, content=content, headers=headers)

    return asyncio.run(run())


def _body(size: int) -> bytes:
    body = json.dumps({"prompt": "x", "max_tokens": 2}).encode()
    return body + b" " * (size - len(body))


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize(("size", "status"), [(1 << 20, 200), ((1 << 20) + 1, 413)])
def test_a_body_has_a_largest_size(served: Any, is_chunked: bool, size: int, status: int) -> None:
    async def pieces() -> Any:
        whole = _body(size)
        for start in range(0, size, 1 << 18):
            yield whole[start : start + (1 << 18)]

    response = _post(served, ServerConfig(max_body_mib=1), pieces() if is_chunked else _body(size))
    assert response.status_code == status
    if status == 413:
        assert "--max-body-mib" in response.json()["error"]["message"]
        assert response.headers["connection"] == "close"


def test_a_body_that_does_not_come_is_408(served: Any) -> None:
    async def drip() -> Any:
        yield b'{"prompt": '
        await asyncio.sleep(PATIENCE_S)
        yield b'"x"}'

    start = time.monotonic()
    response = _post(served, ServerConfig(read_timeout_s=0.2), drip())
    assert time.monotonic() - start < PATIENCE_S / 2
    assert (response.status_code, response.headers["connection"]) == (408, "close")


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_has_a_longest_time(make: Any, stream: bool) -> None:
    served = make(config=EngineConfig.of(request_timeout_s=1.0), delay_s=0.02)
    response = served.talk((PATH, {"prompt": "x", "max_tokens": 400, "stream": stream}))[0]
    text = response.text
    if stream:
        assert response.status_code == 200
        *_, error, done, _ = text.split("\n\n")
        assert done == "data: [DONE]"
        text = error.removeprefix("data: ")
    else:
        assert response.status_code == 504
    assert json.loads(text)["error"]["type"] == "timeout_error"
    assert served.engine.aborted


def test_a_request_that_is_quick_enough_is_not_ended_later(make: Any) -> None:
    served = make(config=EngineConfig.of(request_timeout_s=1.0))

    async def run() -> None:
        async with served.running() as client:
            assert (await client.post(PATH, json={"prompt": "x", "max_tokens": 3})).status_code == 200
            await asyncio.sleep(1.2)
            assert served.engine.aborted == []

    asyncio.run(run())


def test_who_waited_for_as_long_as_allowed_is_refused(make: Any) -> None:
    served = make(config=EngineConfig.of(max_num_seqs=1, max_queue_wait_s=0.9), delay_s=0.01)

    async def run() -> None:
        async with served.running() as client:
            first = asyncio.create_task(client.post(PATH, json={"prompt": "x", "max_tokens": 300}))
            while not served.engine.running:
                await asyncio.sleep(0.001)
            second = await client.post(PATH, json={"prompt": "x", "max_tokens": 1})
            assert second.status_code == 503
            assert int(second.headers["retry-after"]) >= 1
            assert "0.9 s" in second.json()["error"]["message"]
            assert (await first).status_code == 200
            assert len(set(served.engine.aborted)) == 1

    asyncio.run(run())


def test_the_end_of_the_queue_is_told_when_an_overload_begins(make: Any) -> None:
    """Seats take a second and the queue may take 15: when it does, all but one of those who wait are refused."""
    body = {"prompt": "x", "max_tokens": 100}

    async def run() -> None:
        served = make(config=EngineConfig.of(max_num_seqs=1, max_queue_wait_s=15.0), delay_s=0.01)
        async with served.running() as client:
            assert (await client.post(PATH, json=body)).status_code == 200
            running = asyncio.create_task(client.post(PATH, json=body))
            while not served.engine.running:
                await asyncio.sleep(0.001)
            bodies = [{"prompt": "x", "max_tokens": 1, "priority": -1 if i == 7 else 0} for i in range(20)]
            answers = await asyncio.gather(*(client.post(PATH, json=body) for body in bodies))
            assert [i for i, answer in enumerate(answers) if answer.status_code == 200] == [7]
            late = answers[0]
            assert (late.status_code, int(late.headers["retry-after"]) >= 1) == (503, True)
            assert "at the end of the queue" in late.json()["error"]["message"]
            assert (await running).status_code == 200

    on_a_quiet_moment(lambda: asyncio.run(run()))


class TestAdmission:
    """The queue's limit in time, with a clock of our own."""

    def make(self, **settings: Any) -> Admission:
        self.now_s = 1000.0
        config = EngineConfig.of(max_num_seqs=4, **settings)
        return Admission(config, lambda: self.now_s)

    def check(self, admission: Admission, num_queued: int) -> None:
        admission.check(num_queued, 1, lambda: 0)

    def test_the_expected_wait_is_the_queue_times_the_time_of_a_seat_over_seats(self) -> None:
        admission = self.make()
        assert admission.expected_wait_s(10) == 0
        for seat_s in (1.0, 3.0):
            admission.note_finished(seat_s)
        assert admission.expected_wait_s(10) == pytest.approx(10 * 2 / 4)

    def test_a_burst_may_wait_in_full_and_an_overload_only_to_keep_seats_filled(self) -> None:
        admission = self.make(max_queue_wait_s=10.0)
        admission.note_finished(4.0)  # one second per place in the queue
        self.check(admission, 9)
        with pytest.raises(OverloadedError) as refused:
            self.check(admission, 10)
        assert refused.value.retry_after_s == 5
        with pytest.raises(OverloadedError):
            self.check(admission, 1)
        self.check(admission, 0)
        self.now_s += 4.1
        self.check(admission, 9)

    def come(self, admission: Admission, per_s: int, served_per_s: int = 10, waiting: int = 0) -> float | None:
        """Requests come steadily for half a minute; seconds until one is refused."""
        for i in range(30 * per_s):
            self.now_s += 1 / per_s
            num_queued = max(0, waiting + int((per_s - served_per_s) * i / per_s))
            admission.note_arrival(num_queued)
            try:
                self.check(admission, num_queued)
            except OverloadedError:
                return (i + 1) / per_s
        return None

    def test_far_more_than_can_be_served_is_an_overload(self) -> None:
        admission = self.make(max_queue_wait_s=60.0)
        admission.note_finished(0.4)  # ten can be served in a second
        assert self.come(admission, per_s=15) is None
        self.now_s += 60
        assert 4.0 < (self.come(admission, per_s=25) or 0) < 6.0

    def test_many_at_once_are_a_burst(self) -> None:
        admission = self.make(max_queue_wait_s=60.0)
        admission.note_finished(0.4)
        for num_queued in range(100):
            admission.note_arrival(num_queued)
            self.check(admission, num_queued)
        assert self.come(admission, per_s=8, waiting=100) is None

    def test_a_machine_that_stands_still_is_not_overloaded(self) -> None:
        admission = self.make(max_queue_wait_s=60.0)
        admission.note_arrival(1)
        for seat_s in [0.4] * 200 + [5.0] * 4:  # as many as there are seats
            admission.note_finished(seat_s)
        assert self.come(admission, per_s=10, served_per_s=0) is None

    def test_without_the_setting_only_numbers_count(self) -> None:
        admission = self.make(max_num_queued_reqs=50)
        admission.note_finished(1e6)
        self.check(admission, 49)
        with pytest.raises(OverloadedError) as refused:
            self.check(admission, 50)
        assert refused.value.retry_after_s == 60
        assert not admission.is_overloaded


@pytest.mark.parametrize("name", ["max_queue_wait_s", "request_timeout_s", "max_prompt_tokens"])
@pytest.mark.parametrize("value", [0, -1])
def test_limits_that_let_nothing_through_are_errors(name: str, value: int) -> None:
    limit: dict[str, Any] = {name: value}
    with pytest.raises(ConfigError, match=name.replace("_", "-")):
        EngineConfig.of(**limit)
