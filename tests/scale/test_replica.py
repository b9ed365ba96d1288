"""A replica with the demo model answers as the server does; its reports and its end."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from moe_serve.config import EngineConfig, ServerConfig
from moe_serve.demo import MODEL
from moe_serve.scale.autoscaling import IN_FLIGHT, PLACES, QUEUE_S
from moe_serve.scale.exchange import Request
from moe_serve.scale.replica import Replica


def post(path: str, **fields: Any) -> Request:
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "state": {},
    }
    return Request(scope, json.dumps(fields).encode())


async def body_of(replica: Replica, request: Request) -> str:
    messages = [message async for several in replica.exchange(request) for message in several]
    assert messages[0]["status"] == 200
    return b"".join(message["body"] for message in messages[1:]).decode()


def test_a_replica_answers_streams_and_reports() -> None:
    async def run() -> None:
        replica = Replica(EngineConfig.of(model=str(MODEL), max_num_seqs=4), ServerConfig.of(dashboard=False))
        fields = {"prompt": "The cat", "max_tokens": 8, "temperature": 0}
        whole, streamed = await asyncio.gather(
            body_of(replica, post("/v1/completions", **fields)),
            body_of(replica, post("/v1/completions", **fields, stream=True)),
        )
        events = [line[6:] for line in streamed.splitlines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        text = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
        assert text == json.loads(whole)["choices"][0]["text"] != ""
        await replica.check_health()
        assert await replica.record_autoscaling_stats() == {QUEUE_S: 0.0, IN_FLIGHT: 0, PLACES: 4}
        await replica.close()

    asyncio.run(run())


def test_a_full_replica_reports_how_long_its_queue_waits() -> None:
    async def run() -> None:
        replica = Replica(EngineConfig.of(model=str(MODEL), max_num_seqs=1), ServerConfig.of(dashboard=False))
        fields = {"prompt": "The cat", "max_tokens": 400, "temperature": 0, "ignore_eos": True}
        tasks = [asyncio.create_task(body_of(replica, post("/v1/completions", **fields))) for _ in range(3)]
        stats = await replica.record_autoscaling_stats()
        while stats[QUEUE_S] == 0 and not all(task.done() for task in tasks):
            await asyncio.sleep(0.005)
            stats = await replica.record_autoscaling_stats()
        assert stats[QUEUE_S] > 0
        assert stats[IN_FLIGHT] in (2, 3)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while (await replica.record_autoscaling_stats())[IN_FLIGHT]:
            await asyncio.sleep(0.005)
        await replica.close()

    asyncio.run(run())
