"""ExpertCollector: what the experts do, by layer, as Prometheus metrics computed at each scrape.

The engine's step pays nothing for the labels. Names follow vLLM's style; no other engine has these.
Load by expert is not here, since layers times experts are too many series: the dashboard shows it.

Shape alphabet: L layers by dense index.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from expert_cache.report import ExpertReport
from moe_serve.server.monitoring.interval import Interval
from moe_serve.server.monitoring.last_minute import LastMinute


class Family(NamedTuple):
    """A metric: its labels beside those of every metric, and what it means."""

    labels: tuple[str, ...]
    help: str


LAYER = ("layer",)
COUNTERS = {
    "expert_cache_queries": Family(LAYER, "(layer, expert) uses, one per layer, step and expert."),
    "expert_cache_hits": Family(LAYER, "Of those, the ones whose expert was there when the router asked."),
    "expert_cache_prefetch_hits": Family(LAYER, "Of the hits, the first uses of experts brought ahead of time."),
    "expert_cache_late_prefetches": Family(LAYER, "Uses whose expert was on its way when the router asked."),
    "expert_cache_host_runs": Family(LAYER, "Uses computed from the host's copy instead of bringing the expert."),
    "expert_cache_evictions": Family(LAYER, "Experts that lost their slot."),
    "expert_used_bytes": Family(("layer", "tier"), "Bytes of the experts used, by the tier they were in just before."),
    "expert_load_bytes": Family(("layer", "tier"), "Bytes read because the router asked, by the tier they came from."),
    "expert_prefetch_bytes": Family(("layer", "tier"), "Bytes read ahead of time, by the tier they came from."),
    "expert_wasted_bytes": Family(LAYER, "Bytes read ahead of time, but cancelled or evicted before any use."),
    "expert_read_errors": Family(LAYER, "Experts whose bytes could not be read or were damaged."),
    "expert_stall_seconds": Family(LAYER, "Time the model waited for experts."),
    "expert_prediction_tp": Family(("layer", "predictor"), "Experts that were expected and used."),
    "expert_prediction_fp": Family(("layer", "predictor"), "Experts that were expected and not used."),
    "expert_prediction_fn": Family(
        ("layer", "predictor"), "Experts used but not expected, in steps for which there was advice."
    ),
}
GAUGES = {
    "expert_cache_resident": Family(LAYER, "Experts that could run now."),
    "expert_balancedness": Family(LAYER, "Mean over maximum of the experts' tokens in the last minute; 1 is even."),
    "expert_cache_slots": Family((), "Experts that the cache may hold; 0 without a cache."),
    "expert_cache_used_bytes": Family((), "Memory of the slots in use."),
    "expert_cache_belady_gap_perc": Family(
        (), "Recent expert cache misses that perfect foresight would have avoided, 0 to 1."
    ),
    "expert_shadow_hits": Family(("policy",), "Hits since the start that another cache policy would have had."),
    "expert_link_bytes_per_second": Family((), "Rate at which experts came in while any did, in the last minute."),
    "decode_link_limit_perc": Family((), "Decode speed over what that rate would allow, in the last minute, 0 to 1."),
}
Samples = dict[tuple[str, ...], float]
"""Value by the family's own labels."""


class ExpertCollector(Collector):
    """Asked by the registry at each scrape. A metric without anything to say has no samples."""

    def __init__(self, live: LastMinute, prefix: str, labels: Mapping[str, str], predictor: str) -> None:
        """`labels`: those of every metric. `predictor`: who advises, as in --moe-prefetch."""
        self._live = live
        self._prefix = prefix
        self._labels = labels
        self._predictor = predictor

    def collect(self) -> Iterator[Metric]:
        window = self._live.window()
        report = window.end.experts
        counters = {} if report is None else counter_samples(report, self._predictor)
        values = {} if report is None else gauge_samples(window, report)
        yield from self._families(CounterMetricFamily, COUNTERS, counters)
        yield from self._families(GaugeMetricFamily, GAUGES, values)

    def _families(self, kind: Any, families: Mapping[str, Family], samples: Mapping[str, Samples]) -> Iterator[Metric]:
        for name, (labels, text) in families.items():
            family = kind(self._prefix + name, text, labels=[*self._labels, *labels])
            for own, value in samples.get(name, {}).items():
                family.add_metric([*self._labels.values(), *own], value)
            yield family


def counter_samples(report: ExpertReport, predictor: str) -> dict[str, Samples]:
    """Of every one of COUNTERS that has something to say."""
    counts, layers, has_cache = report.counts, report.layers, report.residency.num_slots > 0
    samples = {
        "expert_cache_queries": _by_layer(layers, counts["hits"] + counts["misses"]),
        "expert_cache_hits": _by_layer(layers, counts["hits"]),
        "expert_used_bytes": _used_bytes(report),
    }
    if has_cache:
        tier = report.residency.slow_tier
        samples |= {
            "expert_cache_prefetch_hits": _by_layer(layers, counts["prefetch_hits"]),
            "expert_cache_late_prefetches": _by_layer(layers, counts["late_prefetches"]),
            "expert_cache_host_runs": _by_layer(layers, counts["host_runs"]),
            "expert_cache_evictions": _by_layer(layers, counts["evictions"]),
            "expert_load_bytes": _by_layer(layers, counts["demand_bytes"], tier),
            "expert_prefetch_bytes": _by_layer(layers, counts["prefetch_bytes"], tier),
            "expert_wasted_bytes": _by_layer(layers, counts["wasted_bytes"]),
            "expert_read_errors": _by_layer(layers, counts["read_errors"]),
            "expert_stall_seconds": _by_layer(layers, counts["stall_s"]),
        }
    if has_cache and predictor != "off":
        samples |= {
            "expert_prediction_tp": _by_layer(layers, counts["predicted_used"], predictor),
            "expert_prediction_fp": _by_layer(layers, counts["predicted_unused"], predictor),
            "expert_prediction_fn": _by_layer(layers, counts["unpredicted"], predictor),
        }
    return samples


def gauge_samples(window: Interval, report: ExpertReport) -> dict[str, Samples]:
    """Of every one of GAUGES that has something to say."""
    residency = report.residency
    single = {
        "expert_cache_slots": residency.num_slots,
        "expert_cache_used_bytes": residency.used_bytes,
        "expert_cache_belady_gap_perc": report.belady_gap_frac,
        "expert_link_bytes_per_second": window.link_bytes_per_s,
        "decode_link_limit_perc": window.link_limit_frac,
    }
    return {
        "expert_cache_resident": _by_layer(report.layers, residency.ready.sum(axis=1)),
        "expert_balancedness": _by_layer(report.layers, window.balancedness),
        "expert_shadow_hits": {(policy,): hits for policy, hits in report.shadow_hits.items()},
        **{name: {(): value} for name, value in single.items() if value is not None},
    }


def _used_bytes(report: ExpertReport) -> Samples:
    """Hits from the fast tier, misses from the slow one."""
    residency, size = report.residency, report.expert_bytes
    samples = _by_layer(report.layers, report.counts["hits"] * size, residency.fast_tier)
    if residency.num_slots:
        samples |= _by_layer(report.layers, report.counts["misses"] * size, residency.slow_tier)
    return samples


def _by_layer(layers: Iterable[int], values: Iterable[float], *labels: str) -> Samples:
    """values [L]; those that are NaN have nothing to say."""
    named = zip(layers, values, strict=True)
    return {(str(layer), *labels): float(value) for layer, value in named if not math.isnan(value)}
