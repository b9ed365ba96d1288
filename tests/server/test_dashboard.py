"""The dashboard's routes, its headers, and that its numbers are the metrics' and the engine's own. No browser."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from moe_serve.cli.flags import default_model
from moe_serve.config import EngineConfig
from moe_serve.engine.async_engine import AsyncEngine
from moe_serve.engine.engine import Engine
from moe_serve.server.app import create_app
from moe_serve.server.endpoints import dashboard

GOOD = ("/v1/completions", {"prompt": [5, 6, 7, 8], "max_tokens": 5})
DATA = ("/dashboard/data", None)


def data_after(served: Any, *posts: Any) -> dict[str, Any]:
    answer = served.talk(*posts, DATA)[-1]
    assert answer.status_code == 200
    found: dict[str, Any] = json.loads(answer.text, parse_constant=pytest.fail)
    return found


# ---- the page and its files -----------------------------------------------------------------------


def test_the_page_and_everything_it_names_is_served(make: Any) -> None:
    page = make().talk(("/dashboard", None))[0]
    assert page.headers["content-type"].startswith("text/html")
    names = re.findall(r'(?:src|href)="(dashboard/[\w.]+)"', page.text)
    assert len(names) == 3
    for answer in make().talk(*((f"/{name}", None) for name in names)):
        assert answer.status_code == 200


def test_every_module_imports_files_that_are_there() -> None:
    for path in dashboard.STATIC.glob("*.js"):
        for name in re.findall(r'from "\./([\w.]+)"', path.read_text()):
            assert (dashboard.STATIC / name).is_file(), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", ["/dashboard", "/dashboard/app.js", "/dashboard/style.css", "/dashboard/data"])
def test_the_browser_may_load_from_nowhere_else(served: Any, path: str) -> None:
    headers = served.talk((path, None))[0].headers
    policy = dict(part.split(maxsplit=1) for part in headers["content-security-policy"].split("; "))
    assert policy.pop("default-src") == "'none'"
    assert set(policy.values()) == {"'self'", "'none'"}
    assert headers["x-content-type-options"] == "nosniff"


def test_the_page_needs_nothing_that_the_policy_forbids() -> None:
    for path in dashboard.STATIC.iterdir():
        text = path.read_text()
        assert not re.search(r"\son\w+=|javascript:|<script>|<style|\sstyle=", text), path.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text), path.name
        assert set(re.findall(r"https?://[\w.]+", text)) <= {"http://www.w3.org"}, path.name


def test_an_unknown_file_is_a_404(served: Any) -> None:
    for answer in served.talk(("/dashboard/secret.txt", None), ("/dashboard/..%2Fapp.py", None)):
        assert answer.status_code == 404


def test_it_can_be_left_out(make: Any) -> None:
    page, data, health = make(app_with_dashboard=False).talk(("/dashboard", None), DATA, ("/health", None))
    assert page.status_code == data.status_code == 404
    assert health.status_code == 200


def test_its_routes_are_no_part_of_the_api(served: Any) -> None:
    assert not [path for path in served.app.openapi()["paths"] if path.startswith("/dashboard")]


# ---- contrast: WCAG AA, both themes ---------------------------------------------------------------


def theme_colours() -> dict[str, tuple[str, str]]:
    css = (dashboard.STATIC / "style.css").read_text()
    return {m[1]: (m[2], m[3]) for m in re.finditer(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", css)}


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("front", "back", "least"),
    [
        *((front, back, 4.5) for front in ("ink", "muted", "accent", "bad", "watch") for back in ("card", "page")),
        ("on-accent", "accent", 4.5),
        ("edge", "card", 3),
        ("edge", "page", 3),
        ("accent", "line", 3),
        ("edge", "line", 2.5),  # bars whose value stands beside them
    ],
)
def test_contrast(front: str, back: str, least: float, theme: int) -> None:
    colours = theme_colours()
    assert contrast(colours[front][theme], colours[back][theme]) >= least


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_the_heat_maps_scale_is_one_of_lightness(theme: int) -> None:
    css = (dashboard.STATIC / "style.css").read_text()
    ramp = re.findall(r"\.heat-\d \{ background: light-dark\((#\w{6}), (#\w{6})\)", css)
    steps = [luminance(colours[theme]) for colours in ramp]
    assert len(steps) == 5
    assert steps == sorted(steps, reverse=theme == 0)


# ---- the numbers ----------------------------------------------------------------------------------


def test_the_numbers_of_an_engine_with_a_cache(served: Any) -> None:
    data = data_after(served, GOOD, GOOD)
    experts = data["experts"]
    assert data["model"] == "fake-model"
    assert data["state"] == "ready"
    assert data["ttft"] == {"count": 10, "p50_s": 0.1, "p99_s": 0.1}
    assert data["inter_token"] == {"count": 10, "p50_s": 0.01, "p99_s": 0.01}
    assert data["rss_bytes"] > 10e6
    assert experts["layers"] == [1, 3]
    assert experts["tokens"] == [[40, 0, 0, 0], [10, 10, 10, 10]]
    assert experts["residency"] == [[1, 1, 0, 0], [1, 1, 1, 2]]
    assert experts["by_layer"]["recall"] == [None, 0.75]
    assert experts["by_layer"]["precision"] == [None, 0.6]
    assert experts["by_layer"]["balancedness"] == [0.25, 1]
    assert experts["cache"]["hits"] == 60
    assert experts["cache"]["queries"] == 80
    assert experts["cache"]["shadow_hits"] == {"lru": 9}
    assert experts["cache"]["link_bytes_per_s"] == 2000


def test_before_anything_ran_there_are_gaps_and_no_errors(served: Any) -> None:
    data = data_after(served)
    assert data["ttft"] == {"count": 0, "p50_s": None, "p99_s": None}
    assert data["experts"]["tokens_since_start"]
    assert data["experts"]["by_layer"]["hit_frac"] == [None, None]
    assert data["experts"]["cache"]["link_limit_frac"] is None


def test_requests_in_flight_have_a_stage_and_no_text(make: Any) -> None:
    """One that answers and one that waits; what they say is not there."""
    served = make(delay_s=0.01)

    async def run() -> list[dict[str, Any]]:
        async with served.running() as client:
            long = asyncio.create_task(client.post("/v1/completions", json={"prompt": [5, 6, 7], "max_tokens": 300}))
            while (
                not (rows := (await client.get("/dashboard/data")).json()["requests"]) or not rows[0]["output_tokens"]
            ):
                await asyncio.sleep(0.005)
            long.cancel()
            return list(rows)

    (row,) = asyncio.run(run())
    assert row["stage"] == "answering"
    assert (row["prompt_tokens"], row["max_tokens"]) == (3, 300)
    assert 0 < row["output_tokens"] <= 300
    assert row["age_s"] > 0
    assert set(row) == {"id", "age_s", "stage", "prompt_tokens", "output_tokens", "max_tokens"}


def test_a_refusal_and_a_dead_engine_are_findings(make: Any) -> None:
    served = make(failing_steps=3)
    data = data_after(served, *[GOOD] * 4)
    (finding,) = data["findings"]
    assert finding["severity"] == "problem"
    assert "dead" in finding["title"]
    assert served.async_engine.state == "dead"


def test_an_engine_without_experts_has_the_rest(make: Any) -> None:
    data = data_after(make(experts=lambda _: None), GOOD)
    assert data["experts"] is None
    assert data["ttft"]["count"] == 5


# ---- a real engine --------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "num_threads": 1,
    "num_kv_pages": 64,
    "max_model_len": 128,
}
CACHED = {
    "moe_cache_mib": 6,
    "moe_prefetch": "next-gate",
    "moe_prefetch_audit": False,  # it would leave steps without advice
    "moe_cache_shadow": "lru",
}


@pytest.fixture(scope="module", params=[CACHED, {"moe_cache_mib": 0}], ids=["cached", "mapped"])
def real(request: pytest.FixtureRequest) -> Iterator[tuple[Engine, TestClient]]:
    """The demo model after one answer of 24 tokens."""
    engine = Engine.from_config(EngineConfig.from_dict({"model": default_model(), **SMALL, **request.param}))
    app = create_app(AsyncEngine(engine), engine.tokenizer, model_name="demo")
    with TestClient(app) as client:
        # Short, because a longer prompt's layers stream, and then nobody asks for advice.
        body = {"prompt": "It was", "max_tokens": 24, "ignore_eos": True, "temperature": 0}
        assert client.post("/v1/completions", json=body).status_code == 200
        yield engine, client


def sums(text: str) -> dict[str, float]:
    """Metrics summed over all labels."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("moe_serve:"):
            name, value = line.removeprefix("moe_serve:").split("{")[0], float(line.rsplit(" ", 1)[1])
            found[name] = found.get(name, 0) + value
    return found


def test_dashboard_metrics_and_engine_agree(real: tuple[Engine, TestClient]) -> None:
    engine, client = real
    counters = engine.runner.experts.counters  # type: ignore[attr-defined]
    metrics, data = sums(client.get("/metrics").text), client.get("/dashboard/data").json()
    experts = data["experts"]
    uses = counters.num_hits + counters.num_misses
    assert metrics["expert_cache_queries_total"] == uses > 8 * 24
    assert metrics["expert_cache_hits_total"] == counters.num_hits
    assert experts["hit_frac"] == pytest.approx(counters.num_hits / uses)
    # Every token of prompt and answer but the last went through two experts of each layer.
    num_tokens = metrics["prompt_tokens_total"] + metrics["generation_tokens_total"] - 1
    assert [sum(row) for row in experts["tokens"]] == [2 * num_tokens] * 8
    assert sum(map(sum, experts["residency"])) >= metrics["expert_cache_resident"]
    assert sum(experts["by_layer"]["resident"]) == metrics["expert_cache_resident"]
    assert data["history"] or data["window_s"] < 1.5


def test_a_cache_tells_what_it_read_and_foresaw(real: tuple[Engine, TestClient]) -> None:
    engine, client = real
    metrics, experts = sums(client.get("/metrics").text), client.get("/dashboard/data").json()["experts"]
    if not engine.config.experts.cache_mib:
        assert experts["cache"] is None
        assert "expert_load_bytes_total" not in metrics
        assert metrics["expert_cache_resident"] == 64
        return
    cache = experts["cache"]
    counters = engine.runner.experts.counters  # type: ignore[attr-defined]
    assert metrics["expert_load_bytes_total"] == counters.demand_bytes.sum() > 0
    assert metrics["expert_used_bytes_total"] == cache["queries"] * experts["expert_bytes"]
    assert metrics["expert_cache_slots"] == cache["num_slots"] == 31
    assert metrics["expert_shadow_hits"] == cache["shadow_hits"]["lru"] > 0
    assert metrics["expert_link_bytes_per_second"] == pytest.approx(cache["link_bytes_per_s"], rel=0.05)
    assert 0 < cache["link_limit_frac"] < 2
    assert cache["decode_tokens_per_s"] == pytest.approx(cache["link_limit_frac"] * cache["link_limit_tokens_per_s"])
    used = metrics["expert_prediction_tp_total"] + metrics["expert_prediction_fn_total"]
    # Every use after the first layer, which nobody can foresee, was preceded by advice.
    assert used == (counters.hits + counters.misses)[1:].sum()
    assert experts["by_layer"]["recall"][0] is None
    # What comes before the second layer is little more than a token, so only from the third on.
    recalls = experts["by_layer"]["recall"][2:]
    assert all(recall > 0.3 for recall in recalls), recalls
