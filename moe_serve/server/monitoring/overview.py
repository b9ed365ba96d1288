"""The numbers that the dashboard draws: what is wrong, requests in flight, the last minute, experts. All as JSON.

Knows the engine's face and LastMinute; knows no HTTP. It reads no prompt and no answer.

Shape alphabet: L layers by dense index, E experts per layer.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from expert_cache.report import ExpertReport
from moe_serve.config import EngineConfig
from moe_serve.engine.async_engine import AsyncEngine
from moe_serve.engine.request_queue import Pending
from moe_serve.server.monitoring.findings import Situation, findings
from moe_serve.server.monitoring.interval import Interval
from moe_serve.server.monitoring.last_minute import LastMinute

MOST_REQUESTS = 50
"""Rows of requests in flight."""


def overview(engine: AsyncEngine, live: LastMinute) -> dict[str, Any]:
    """Everything the page draws but the server's name and age."""
    config = engine.core.config
    now = Situation(engine.state, engine.cause, live.load, live.num_rejected(), live.window(), config)
    return {
        "findings": [asdict(finding) for finding in findings(now)],
        "num_seats": config.max_num_seqs,
        **_requests(engine),
        **snapshot(live, config),
    }


def _requests(engine: AsyncEngine) -> dict[str, Any]:
    """Requests in flight, the oldest first, MOST_REQUESTS at most: how far they are, and nothing of what they say."""
    now_s, pending = time.monotonic(), engine.in_flight
    rows = [
        {
            "id": one.request.request_id,
            "age_s": now_s - one.request.arrival_time_s,
            "stage": _stage(engine, one),
            "prompt_tokens": len(one.request.prompt_token_ids),
            "output_tokens": one.num_output_tokens,
            "max_tokens": one.request.params.max_tokens,
        }
        for one in pending[:MOST_REQUESTS]
    ]
    return {"requests": rows, "num_requests": len(pending)}


def _stage(engine: AsyncEngine, one: Pending) -> str:
    if one.first_output_s is not None:
        return "answering"
    return "waiting" if engine.core.is_waiting(one.request.request_id) else "reading the prompt"


def snapshot(live: LastMinute, config: EngineConfig, rss_bytes: Callable[[], int] | None = None) -> dict[str, Any]:
    """Everything the page draws, as JSON. Missing numbers are null. `rss_bytes`: of this process."""
    window, seconds = live.window(), live.seconds()
    report = window.end.experts
    return {
        "window_s": window.seconds,
        "load": asdict(live.load),
        "rss_bytes": (rss_bytes or resident_bytes)(),
        "prompt_tokens_per_s": window.prompt_tokens_per_s,
        "generated_tokens_per_s": window.generated_tokens_per_s,
        "ttft": asdict(live.ttft()),
        "inter_token": asdict(live.inter_token()),
        "history": [_second(second, window.end.time_s) for second in seconds],
        "experts": None if report is None else _experts(window, report, config),
    }


def _second(window: Interval, now_s: float) -> dict[str, Any]:
    """One point of the curves; `age_s` is that of its end."""
    return {
        "age_s": now_s - window.end.time_s,
        "seconds": window.seconds,
        "prompt_tokens_per_s": window.prompt_tokens_per_s,
        "generated_tokens_per_s": window.generated_tokens_per_s,
        "hit_frac": None if window.end.experts is None else window.hit_frac,
    }


def _experts(window: Interval, report: ExpertReport, config: EngineConfig) -> dict[str, Any]:
    is_idle = not window.tokens.any()
    return {
        "layers": report.layers,
        "num_experts": report.tokens.shape[1],
        "expert_bytes": report.expert_bytes,
        "tokens": (report.tokens if is_idle else window.tokens).tolist(),
        "tokens_since_start": is_idle,
        "residency": (report.residency.ready.astype(int) + report.residency.unused).tolist(),
        "by_layer": _by_layer(window, report),
        "hit_frac": window.hit_frac,
        "stall_frac": window.stall_frac,
        "cache": _cache(window, report, config) if report.residency.num_slots else None,
    }


def _by_layer(window: Interval, report: ExpertReport) -> dict[str, Any]:
    return {
        "resident": report.residency.ready.sum(axis=1).tolist(),
        "hit_frac": _finite(window.hit_fracs),
        "recall": _finite(window.recalls),
        "precision": _finite(window.precisions),
        "balancedness": _finite(window.balancedness),
        "stall_s": window.count("stall_s").tolist(),
    }


def _cache(window: Interval, report: ExpertReport, config: EngineConfig) -> dict[str, Any]:
    residency, counts = report.residency, report.counts
    hits = int(counts["hits"].sum())
    return {
        "policy": config.experts.cache_policy,
        "prefetch": config.experts.prefetch,
        "num_slots": residency.num_slots,
        "capacity_bytes": residency.num_slots * residency.slot_bytes,
        "used_bytes": residency.used_bytes,
        "slow_tier": residency.slow_tier,
        "hits": hits,
        "queries": hits + int(counts["misses"].sum()),
        "shadow_hits": dict(report.shadow_hits),
        "belady_gap_frac": report.belady_gap_frac,
        "link_bytes_per_s": window.link_bytes_per_s,
        "decode_tokens_per_s": window.decode_tokens_per_s,
        "link_limit_tokens_per_s": window.link_limit_tokens_per_s,
        "link_limit_frac": window.link_limit_frac,
    }


def _finite(values: NDArray[Any]) -> list[float | None]:
    """[L] for JSON, which knows no NaN."""
    return [None if math.isnan(value) else value for value in values.tolist()]


def resident_bytes() -> int:
    """Memory of this process, files it has mapped included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
