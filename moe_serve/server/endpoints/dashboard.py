"""The page at /dashboard, its files, and the numbers it draws.

Everything comes from this server and nothing from elsewhere, which the Content-Security-Policy holds
the browser to. The numbers show no prompt and no answer. Knows FastAPI and LastMinute; knows no engine.

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

from fastapi import APIRouter, FastAPI, HTTPException
from fastapi.responses import JSONResponse, Response
from numpy.typing import NDArray

from expert_cache.report import ExpertReport
from moe_serve.config import EngineConfig
from moe_serve.server.endpoints.bodies.given import TheService
from moe_serve.server.monitoring.interval import Interval
from moe_serve.server.monitoring.last_minute import LastMinute

router = APIRouter(include_in_schema=False)

STATIC = Path(__file__).parents[1] / "static"
MEDIA_TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


FILES = {path.name: path for path in STATIC.iterdir() if path.suffix in MEDIA_TYPES}


def add(app: FastAPI, service: TheService) -> None:
    """The page's routes, where it is wanted. They are its own: not part of the documented API."""
    if service.with_dashboard:
        app.include_router(router)


@router.get("/dashboard")
async def page() -> Response:
    """The live page, in a browser."""
    return _file(FILES["index.html"])


@router.get("/dashboard/data")
async def data(service: TheService) -> Response:
    """The numbers that the page draws."""
    engine = service.engine
    about = {
        "model": service.model_name,
        "version": service.version,
        "state": engine.state,
        "uptime_s": time.time() - service.started_s,
        "max_model_len": service.max_model_len,
    }
    numbers = snapshot(service.metrics.live, engine.core.config)
    return JSONResponse(about | numbers, headers=HEADERS)


@router.get("/dashboard/{name}")
async def file(name: str) -> Response:
    """A script, style or picture of the page."""
    if name not in FILES:
        raise HTTPException(404, f"the dashboard has no file {name!r}")
    return _file(FILES[name])


def _file(path: Path) -> Response:
    return Response(path.read_bytes(), media_type=MEDIA_TYPES[path.suffix], headers=HEADERS)


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
