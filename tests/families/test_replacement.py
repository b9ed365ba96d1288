"""Another placement while real ranks serve over HTTP: requests and their tokens do not notice, counts do."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from moe_serve.engine.async_engine import AsyncEngine
from moe_serve.parallel.expert_plans import contiguous_plan
from moe_serve.server.app import create_app
from tests.patience import PATIENCE_S

from .references import Reference
from .test_parallel import write_plan
from .test_rank_loss import _ranks_find_this_tree, load  # noqa: F401

Checkpoint = Callable[[str], Path]
References = Callable[[str], Reference]

NEW_TOKENS = 40
INTERVAL_S = 2.0
LAYERS, EXPERTS, TOP_K = 3, 8, 2
"""Of the model here."""


async def complete(client: httpx.AsyncClient, prompts: Any) -> list[list[int]]:
    """Greedy tokens of all prompts, sent together."""
    body = {"max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    answers = await asyncio.gather(
        *(client.post("/v1/completions", json={**body, "prompt": list(prompt)}) for prompt in prompts)
    )
    assert [answer.status_code for answer in answers] == [200] * len(prompts), answers[0].text
    return [answer.json()["choices"][0]["token_ids"] for answer in answers]


async def place(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    answer = await client.post("/expert_plan", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def refused(client: httpx.AsyncClient, **body: Any) -> str:
    """The field that is to blame."""
    answer = await client.post("/expert_plan", json=body)
    assert answer.status_code == 400
    param: str = answer.json()["error"]["param"]
    return param


async def scrape(client: httpx.AsyncClient) -> dict[str, float]:
    """Metrics by name, their labels' values added up."""
    values: dict[str, float] = {}
    for family in text_string_to_metric_families((await client.get("/metrics")).text):
        for sample in family.samples:
            name = sample.name.removeprefix("moe_serve:") + sample.labels.get("outcome", "")
            values[name] = values.get(name, 0) + sample.value
    return values


async def until(client: httpx.AsyncClient, is_so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """/ranks, as soon as it is so; ranks report once a second."""
    for _ in range(round(PATIENCE_S / 0.1)):
        found: dict[str, Any] = (await client.get("/ranks")).json()
        if is_so(found):
            return found
        await asyncio.sleep(0.1)
    raise AssertionError(found)


def all_on_first(plan: dict[str, Any]) -> dict[str, Any]:
    """The same plan with everything on rank 0."""
    everything = np.zeros((LAYERS, EXPERTS), int).tolist()
    return {**plan, "device_of": everything, "replicas": [], "slots": [EXPERTS, EXPERTS]}


def pairs(ranks: dict[str, Any]) -> int:
    """(token, choice, layer) that all ranks have computed."""
    return sum(sum(rank["tokens"]) for rank in ranks["experts"].values())


@pytest.mark.slow
def test_placements_while_serving(checkpoint: Checkpoint, reference: References, tmp_path: Path) -> None:
    folder, prompts = checkpoint("mixtral"), reference("mixtral").prompts
    settings = {"moe_cache_mib": 1, "enable_prefix_caching": False, "expert_plan_margin": 0.95}
    llm = load(folder, **settings, expert_plan_interval=INTERVAL_S)
    app = create_app(AsyncEngine(llm.engine), llm.tokenizer, model_name="tiny", model_path=str(folder))

    async def run() -> None:
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=2 * PATIENCE_S) as client:
                await talk(client)

    async def talk(client: httpx.AsyncClient) -> None:
        start = (await client.get("/expert_plan")).json()
        expected = contiguous_plan(range(LAYERS), EXPERTS, 2)
        assert start["device_of"] == expected.layout.device_of.tolist()
        assert start["replicas"] == expected.layout.replicas.tolist()
        assert "0 tokens of 0 sequences" in (await place(client))["why"]
        first = await complete(client, prompts)
        await refuse_nonsense(client, start)
        num_rounds = await replace_under_load(client, first, start)
        await check_counts(client, 1 + num_rounds)
        await outlive_a_lost_rank(client, first, start)

    async def refuse_nonsense(client: httpx.AsyncClient, start: dict[str, Any]) -> None:
        assert await refused(client, plan={**start, "num_experts": 4}) == "plan.device_of"
        assert await refused(client, plan={"format": "x"}) == "plan.format"
        assert await refused(client, margin_frac=1.5) == "margin_frac"
        assert await refused(client, time_limit_s=0) == "time_limit_s"
        assert await refused(client, plans={}) == "plans"

    async def replace_under_load(client: httpx.AsyncClient, first: Any, start: dict[str, Any]) -> int:
        """How often the prompts were completed meanwhile."""
        files = [write_plan(tmp_path, folder, 0, 0), write_plan(tmp_path, folder, 1, 2)]
        plans = [httpx.Response(200, content=Path(file).read_bytes()).json() for file in files]
        placed_meanwhile = num_rounds = 0
        while placed_meanwhile < 2:  # on a busy machine the prompts may be complete before
            num_rounds += 1
            running = asyncio.create_task(complete(client, prompts))
            while not running.done():
                answer = await place(client, plan=plans[placed_meanwhile % 2])
                assert answer["adopted"]
                placed_meanwhile += not running.done()
                await asyncio.sleep(0.02)
            assert await running == first
        assert not (await place(client, plan=start, margin_frac=0.9, time_limit_s=1))["adopted"]
        judged = await place(client, margin_frac=0.0, time_limit_s=1)
        assert judged["tokens"] > 100
        assert judged["traffic_then"] < judged["traffic_now"] or not judged["adopted"]
        return num_rounds

    async def check_counts(client: httpx.AsyncClient, num_runs: int) -> None:
        """Metrics, dashboard and /ranks agree on what all ranks computed."""
        computed = num_runs * sum(len(prompt) + NEW_TOKENS - 1 for prompt in prompts) * LAYERS * TOP_K
        ranks = await until(client, lambda found: pairs(found) == computed)
        assert all(sum(rank["tokens"]) > 0 for rank in ranks["experts"].values())
        assert all(rank["num_slots"] for rank in ranks["experts"].values())
        values = await scrape(client)
        assert values["ep_expert_tokens_total"] == computed
        assert values["expert_cache_slots"] == sum(rank["num_slots"] for rank in ranks["experts"].values())
        assert values["expert_cache_hits_total"] == sum(rank["hits"] for rank in ranks["experts"].values())
        assert values["ep_expert_plan_decisions_totaladopted"] >= 2
        while (await scrape(client))["ep_expert_plan_decisions_totalkept"] < 4:  # two are ours
            await asyncio.sleep(INTERVAL_S)
        experts = (await client.get("/dashboard/data")).json()["experts"]
        assert sum(map(sum, experts["tokens"])) == computed
        assert experts["cache"]["num_slots"] == values["expert_cache_slots"]

    async def outlive_a_lost_rank(client: httpx.AsyncClient, first: Any, start: dict[str, Any]) -> None:
        """New ranks start with the plan of the command line; the one in force is brought back before any token."""
        await place(client, plan=all_on_first(start))
        before = await until(client, lambda found: found["state"] == "ready")
        os.kill(before["ranks"][1]["pid"], signal.SIGKILL)
        assert await complete(client, prompts) == first
        computed = sum(len(prompt) + NEW_TOKENS - 1 for prompt in prompts) * LAYERS * TOP_K
        after = await until(client, lambda found: pairs(found) == computed)
        assert after["generation"] == 2
        assert sum(after["experts"]["1"]["tokens"]) == 0
        assert (await client.get("/expert_plan")).json()["device_of"] == all_on_first(start)["device_of"]
        total = (await scrape(client))["expert_cache_hits_total"]
        assert total > sum(rank["hits"] for rank in after["experts"].values())  # those of the lost ranks still count

    try:
        asyncio.run(run())
    finally:
        llm.close()
