"""The metrics' names, and that they move."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from moe_serve.config import EngineConfig, ServerConfig
from moe_serve.parallel.front.team import TeamState
from moe_serve.server.endpoints.expert_plan import DecisionCollector
from moe_serve.server.endpoints.ranks import TeamCollector
from moe_serve.server.monitoring import expert_metrics, http_counts, prefix_disk_metrics
from moe_serve.server.monitoring.scrape import BURST_S, MOST_REST_S, SHARE, Budget, Scrape
from moe_serve.server.transport.guard import guard

ROOT = Path(__file__).resolve().parents[2]

COUNTERS = (
    *(
        "prefix_cache_queries",
        "prefix_cache_hits",
        "saved_state_hits",
        "prompt_tokens",
        "generation_tokens",
        "spec_decode_num_draft_tokens",
        "spec_decode_num_accepted_tokens",
        "num_preemptions",
    ),
    *("request_success", "admission_rejections", "http_requests"),
    *prefix_disk_metrics.COUNTERS,
    *expert_metrics.COUNTERS,
)
GAUGES = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "saved_states",
    "cache_config_info",
    "compute_info",
    *prefix_disk_metrics.GAUGES,
    *expert_metrics.GAUGES,
)
HISTOGRAMS = (
    *("iteration_tokens_total", "time_to_first_token_seconds", "inter_token_latency_seconds"),
    *("request_time_per_output_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"),
    *("request_prefill_time_seconds", "request_decode_time_seconds", "request_inference_time_seconds"),
    *("request_prompt_tokens", "request_generation_tokens", "request_params_n", "request_params_max_tokens"),
)
GOOD = ("/v1/completions", {"prompt": [5, 6, 7, 8], "max_tokens": 5})


def ours(text: str) -> list[Metric]:
    """The families but those of the process, whose names and lack of labels are Prometheus' own."""
    return [f for f in text_string_to_metric_families(text) if not f.name.startswith("process_")]


def scrape(served: Any, *posts: Any) -> dict[str, float]:
    """Values by name after these posts, summed over layers; other labels than these, and the reason, left out."""
    text = served.talk(*posts, ("/metrics", None))[-1].text
    values: dict[str, float] = {}
    for family in ours(text):
        for sample in family.samples:
            assert sample.labels["model_name"] == "fake-model"
            assert sample.labels["engine"] == "0"
            reason = sample.labels.get("finished_reason") or sample.labels.get("reason") or ""
            name = f"{sample.name.removeprefix('moe_serve:')}{reason and '/' + reason}"
            values[name] = values.get(name, 0) + sample.value if "layer" in sample.labels else sample.value
    return values


def test_vllms_names_are_all_there_from_the_start(served: Any) -> None:
    text = served.talk(("/metrics", None))[0].text
    kinds = {f.name.removeprefix("moe_serve:"): f.type for f in ours(text)}
    kinds = {name: kind for name, kind in kinds.items() if not name.endswith("_created")}
    expected = {n: "counter" for n in COUNTERS} | {n: "gauge" for n in GAUGES} | {n: "histogram" for n in HISTOGRAMS}
    assert kinds == expected


def test_counters_move(served: Any) -> None:
    values = scrape(served, GOOD, GOOD)
    assert values["prompt_tokens_total"] == 8
    assert values["generation_tokens_total"] == 10
    assert values["prefix_cache_hits_total"] == 4
    assert values["expert_cache_queries_total"] == 80
    assert values["expert_cache_hits_total"] == 60
    assert values["expert_load_bytes_total"] == 10000
    assert values["expert_stall_seconds_total"] == 5
    assert values["expert_cache_belady_gap_perc"] == 0.25
    assert values["expert_shadow_hits"] == 9
    assert values["request_success_total/length"] == 2
    assert values["e2e_request_latency_seconds_count"] == 2
    assert values["request_generation_tokens_sum"] == 10
    assert values["request_params_max_tokens_sum"] == 10
    assert values["kv_cache_usage_perc"] == 0.5


def test_two_apps_share_nothing(make: Any) -> None:
    assert scrape(make(), GOOD)["prompt_tokens_total"] == 4
    assert scrape(make())["prompt_tokens_total"] == 0


def layered(served: Any, name: str) -> dict[tuple[str, ...], float]:
    """Samples of a metric after two requests of five steps each, by its labels other than model and engine."""
    text = served.talk(GOOD, GOOD, ("/metrics", None))[-1].text
    samples = (s for f in ours(text) for s in f.samples)
    return {
        tuple(v for k, v in sorted(s.labels.items()) if k not in ("model_name", "engine")): s.value
        for s in samples
        if s.name == f"moe_serve:{name}"
    }


def test_what_experts_do_is_told_by_layer(make: Any) -> None:
    assert layered(make(), "expert_cache_hits_total") == {("1",): 20, ("3",): 40}
    assert layered(make(), "expert_stall_seconds_total") == {("1",): 5, ("3",): 0}
    assert layered(make(), "expert_cache_resident") == {("1",): 2, ("3",): 4}
    assert layered(make(), "expert_balancedness") == {("1",): 0.25, ("3",): 1}


def test_bytes_are_told_by_tier(make: Any) -> None:
    used = layered(make(), "expert_used_bytes_total")
    assert used == {("1", "device"): 10000, ("1", "disk"): 10000, ("3", "device"): 20000, ("3", "disk"): 0}
    assert layered(make(), "expert_load_bytes_total") == {("1", "disk"): 10000, ("3", "disk"): 0}


def test_predictions_are_told_only_where_somebody_predicts(make: Any) -> None:
    predicting = EngineConfig.of(moe_prefetch="next-gate")
    assert layered(make(config=predicting), "expert_prediction_tp_total") == {
        ("1", "next-gate"): 0,
        ("3", "next-gate"): 30,
    }
    assert layered(make(config=predicting), "expert_prediction_fp_total")["3", "next-gate"] == 20
    assert layered(make(config=predicting), "expert_prediction_fn_total")["3", "next-gate"] == 10
    assert layered(make(), "expert_prediction_tp_total") == {}


def test_an_engine_without_experts_has_no_samples_of_them(make: Any) -> None:
    assert layered(make(experts=lambda _: None), "expert_cache_queries_total") == {}
    assert scrape(make(experts=lambda _: None), GOOD)["prompt_tokens_total"] == 4


def docs_table(families: Iterable[Metric]) -> str:
    """A table of docs/metrics.md, from what a server says of itself."""
    own = {**expert_metrics.COUNTERS, **expert_metrics.GAUGES}
    labels = {name: ", ".join(family.labels) for name, family in own.items()}
    labels |= {"request_success": "finished_reason", "admission_rejections": "reason"}
    labels |= {"http_requests": ", ".join(http_counts.LABELS)}
    labels |= {name: ", ".join(names) for name, names in RANK_LABELS.items()}
    rows = ["| name | type | labels | meaning |", "|---|---|---|---|"]
    for family in families:
        name = family.name.removeprefix("moe_serve:")
        if not name.endswith("_created"):
            rows.append(f"| `{name}` | {family.type} | {labels.get(name, '')} | {family.documentation} |")
    return "\n".join(rows)


RANK_LABELS = {
    "ep_sent_bytes": ("rank", "kind"),
    "ep_expert_rows": ("rank", "place"),
    "ep_trips": ("rank",),
    "ep_layer_sent_bytes": ("rank", "layer"),
    "ep_expert_tokens": ("rank",),
    "ep_expert_plan_decisions": ("outcome",),
}
TEAM: Any = SimpleNamespace(state=TeamState.READY, generation=1, counted={}, layers=())
REPORTS: Any = SimpleNamespace(by_rank=dict)
PLACEMENT: Any = SimpleNamespace(counts={})


def all_tables(served: Any) -> list[str]:
    """One device, the process, and what ranks add."""
    text = served.talk(("/metrics", None))[0].text
    process = [f for f in text_string_to_metric_families(text) if f.name.startswith("process_")]
    ranks = [*TeamCollector(TEAM, REPORTS).collect(), *DecisionCollector(PLACEMENT).collect()]
    return [docs_table(ours(text)), docs_table(process), docs_table(ranks)]


def test_every_metric_is_in_the_docs_and_no_other(served: Any) -> None:
    docs = (ROOT / "docs" / "metrics.md").read_text()
    tables = all_tables(served)
    for table in tables:
        assert table in docs, f"docs/metrics.md is stale; its table is:\n{table}"
    rows = {line for table in tables for line in table.splitlines()}
    assert {line for line in docs.splitlines() if line.startswith("| `")} <= rows


def test_which_metrics_have_a_time_of_creation(served: Any) -> None:
    """As docs/metrics.md says: every counter and histogram but those of experts, the disk, HTTP and refusals."""
    names = {f.name.removeprefix("moe_serve:") for f in ours(served.talk(("/metrics", None))[0].text)}
    counted = {*COUNTERS, *HISTOGRAMS} - {"http_requests", "admission_rejections"}
    counted -= {*expert_metrics.COUNTERS, *prefix_disk_metrics.COUNTERS}
    assert {n for n in names if n.endswith("_created")} == {f"{name}_created" for name in counted}


def test_the_process_is_told_of(served: Any) -> None:
    text = served.talk(("/metrics", None))[0].text
    values = {s.name: s.value for f in text_string_to_metric_families(text) for s in f.samples}
    assert values["process_resident_memory_bytes"] > 1e7
    assert values["process_open_fds"] > 2
    assert values["process_cpu_seconds_total"] > 0


def test_answers_are_counted_by_endpoint_method_and_status(make: Any) -> None:
    served = make()
    app = guard(served.app, ServerConfig(), frozenset({"k"}))

    async def ask() -> str:
        transport = httpx.ASGITransport(app=app)
        async with served.running(), httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            key = {"Authorization": "Bearer k"}
            for method, path in (("GET", "/live"), ("GET", "/live"), ("HEAD", "/live"), ("GET", "/v1/models/x/y")):
                await client.request(method, path, headers=key)
            await client.get("/no_such/" + "x" * 50, headers=key)
            await client.request("BREW", "/live", headers=key)
            await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
            return (await client.get("/metrics", headers=key)).text

    found = {
        (s.labels["handler"], s.labels["method"], s.labels["status"]): s.value
        for f in ours(asyncio.run(ask()))
        for s in f.samples
        if f.name == "moe_serve:http_requests"
    }
    assert found["/live", "GET", "200"] == 2
    assert found["/live", "HEAD", "200"] == 1
    assert found["/live", "other", "405"] == 1
    assert found["other", "GET", "404"] == 1
    assert found["other", "POST", "401"] == 1
    assert all(handler.startswith("/v1/models") for handler, *_ in set(found) - {*KNOWN} if handler != "other")


KNOWN = [
    ("/live", "GET", "200"),
    ("/live", "HEAD", "200"),
    ("/live", "other", "405"),
    ("other", "GET", "404"),
    ("other", "POST", "401"),
]


def test_requests_whose_clients_leave_are_counted(served: Any) -> None:
    metrics = served.app.state.service.metrics
    name = 'moe_serve:request_success_total{engine="0",finished_reason="abort",model_name="fake-model"}'
    assert f"{name} 0.0" in metrics.render().decode()
    metrics.on_aborted(2)
    assert f"{name} 2.0" in metrics.render().decode()


def test_a_crowd_of_scrapes_shares_one_rendering() -> None:
    rendered: list[int] = []

    def render() -> bytes:
        rendered.append(1)
        time.sleep(0.02)
        return b"x"

    async def ask() -> None:
        scrape = Scrape(render)
        assert await asyncio.gather(*(scrape.text() for _ in range(50))) == [b"x"] * 50
        assert await scrape.text() == b"x"

    asyncio.run(ask())
    assert len(rendered) == 2


def test_scrapes_one_after_the_other_take_three_percent_of_a_core() -> None:
    """A client that sends many requests for /metrics at once gets them answered in turn."""
    spent_s: list[float] = []

    def render() -> bytes:
        begun_s = time.thread_time()
        while time.thread_time() - begun_s < 0.06:
            pass
        spent_s.append(time.thread_time() - begun_s)
        return b"x"

    async def ask() -> float:
        scrape, begun_s = Scrape(render), time.monotonic()
        for _ in range(3):
            assert await scrape.text() == b"x"
        return time.monotonic() - begun_s

    assert asyncio.run(ask()) > min(MOST_REST_S, (sum(spent_s[:2]) - BURST_S) / SHARE)


def test_the_budget_of_renderings_is_a_burst_and_a_share() -> None:
    budget, now_s = Budget(), 100.0
    assert budget.rest_s(now_s) == 0
    budget.spend(BURST_S)
    assert budget.rest_s(now_s) == 0, "who asks now and then does not wait"
    budget.spend(SHARE / 2)
    assert budget.rest_s(now_s) == pytest.approx(0.5)
    assert budget.rest_s(now_s + 0.5) == pytest.approx(0)
    budget.spend(1000 * MOST_REST_S)
    assert budget.rest_s(now_s + 0.5) == MOST_REST_S, "nobody waits for ever"
    budget.rest_s(now_s + 1e9)
    budget.spend(2 * BURST_S)
    assert budget.rest_s(now_s + 1e9) == MOST_REST_S, "a long pause saves up no more than a burst"
