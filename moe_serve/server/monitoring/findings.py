"""What is wrong with a running server, the worst first, and what to do about each. For the dashboard's first lines.

Rules on numbers of the last minute. Knows flags by name; knows no HTTP and no clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from expert_cache.report import ExpertReport
from moe_serve.config import EngineConfig
from moe_serve.scheduling.stats import EngineLoad
from moe_serve.server.monitoring.interval import Interval

FULL_PAGES_FRAC = 0.9
"""Of the KV pages: new requests wait for pages from about here on."""
LONG_STALL_FRAC = 0.2
"""Of the time that the model waits for experts: above it, more memory or a faster disk is the first thing to try."""
FEW_HITS_FRAC = 0.5
"""Below it more than every second use of an expert needs a read."""
BETTER_POLICY_FRAC = 0.02
"""Hits that another policy would have had more, as a part of all uses."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, or will be soon."""

    severity: Literal["problem", "watch"]
    """problem: requests fail or are refused now. watch: they are slower than they need to be."""
    title: str
    advice: str
    """What to do about it."""


@dataclass(frozen=True, slots=True)
class Situation:
    """What the rules look at."""

    state: str
    """An EngineState."""
    cause: str | None
    """Why the engine is dead, where that is known."""
    load: EngineLoad
    num_rejected: int
    """Requests refused with 503 in the last minute."""
    window: Interval
    config: EngineConfig


def findings(now: Situation) -> list[Finding]:
    """Problems first. Empty: nothing is wrong."""
    found = [*_health(now), *_refusals(now), *_queue(now), *_waits(now), *_hits(now)]
    return sorted(found, key=lambda finding: finding.severity != "problem")


def _health(now: Situation) -> Iterator[Finding]:
    if now.state == "dead":
        cause = now.cause or "Several steps in a row have failed."
        yield Finding("problem", "The engine is dead: every request fails", f"{cause} The log has the error. Restart.")
    elif now.state != "ready":
        yield Finding(
            "problem", f"The server is {now.state}: new requests are refused", "It ends by itself. Start it again."
        )


def _refusals(now: Situation) -> Iterator[Finding]:
    if now.num_rejected and now.state == "ready":
        count = f"{now.num_rejected} request{'s' * (now.num_rejected > 1)} refused in the last minute"
        advice = "More arrives than this server can answer. Add a server, or let more wait: --max-queue-wait-s."
        yield Finding("problem", count, advice)


def _queue(now: Situation) -> Iterator[Finding]:
    load, seats = now.load, now.config.max_num_seqs
    if load.num_waiting and load.num_running >= seats:
        title = f"{load.num_waiting} waiting: all {seats} seats of the batch are taken"
        yield Finding("watch", title, "Raise --max-num-seqs if memory allows, or add a server.")
    elif load.num_waiting and load.kv_usage_frac >= FULL_PAGES_FRAC:
        title = f"{load.num_waiting} waiting: KV pages are {load.kv_usage_frac:.0%} full"
        yield Finding("watch", title, "Raise --kv-cache-mib if memory allows, or add a server.")
    elif load.kv_usage_frac >= FULL_PAGES_FRAC:
        title = f"KV pages are {load.kv_usage_frac:.0%} full"
        yield Finding("watch", title, "The next long prompt will wait. Raise --kv-cache-mib, or lower --max-model-len.")


def _waits(now: Situation) -> Iterator[Finding]:
    report = now.window.end.experts
    if report is None or not report.residency.num_slots or now.window.stall_frac < LONG_STALL_FRAC:
        return
    disk = report.residency.slow_tier == "disk"
    rate = now.window.link_bytes_per_s
    gives = f", which gives {rate / 1e6:,.0f} MB/s" if rate else ""
    title = f"{now.window.stall_frac:.0%} of the time goes to waiting for {'the disk' if disk else 'the link'}{gives}"
    faster = "a faster disk, or a file of packed experts (moe-serve pack)" if disk else "fewer bits per expert"
    yield Finding("watch", title, f"Give the experts more memory (--moe-cache-mib), or use {faster}.")


def _hits(now: Situation) -> Iterator[Finding]:
    report = now.window.end.experts
    if report is None or not report.residency.num_slots:
        return
    hit_frac = now.window.hit_frac
    if hit_frac is not None and hit_frac < FEW_HITS_FRAC:
        share = report.residency.num_slots / report.residency.ready.size
        title = f"{hit_frac:.0%} of the needed experts were in memory"
        yield Finding("watch", title, f"Memory holds {share:.0%} of all experts. Raise --moe-cache-mib.")
    yield from _better_policy(report, now.config.experts.cache_policy)


def _better_policy(report: ExpertReport, policy: str) -> Iterator[Finding]:
    """Among the policies that follow the live traffic as numbers (--moe-cache-shadow)."""
    hits = int(report.counts["hits"].sum())
    uses = hits + int(report.counts["misses"].sum())
    best = max(report.shadow_hits, key=lambda name: report.shadow_hits[name], default=None)
    if best is not None and uses and report.shadow_hits[best] - hits > BETTER_POLICY_FRAC * uses:
        title = f"Policy {best} would have had {report.shadow_hits[best] / uses:.0%} hits since the start"
        yield Finding("watch", title, f"{policy} had {hits / uses:.0%}. Try --moe-cache-policy {best}.")
