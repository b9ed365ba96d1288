"""Prometheus metrics: vLLM's names and buckets under the prefix `moe_serve:`, so dashboards port.

A StatsObserver: the engine thread calls it, prometheus_client's own locks make that safe. One
registry per instance; what the experts do is in expert_metrics.py; knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from expert_cache.report import ExpertReport
from moe_serve.scheduling.finish import FinishedStats, FinishReason
from moe_serve.scheduling.stats import EngineLoad, StepStats
from moe_serve.server.monitoring.expert_metrics import ExpertCollector
from moe_serve.server.monitoring.http_counts import HttpCollector
from moe_serve.server.monitoring.last_minute import LastMinute
from moe_serve.server.monitoring.prefix_disk_metrics import PrefixDiskCollector
from moe_serve.server.monitoring.scrape import Scrape

PREFIX = "moe_serve:"
TTFT_S = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
ITL_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
ITERATION_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
SAMPLES = (1, 2, 5, 10, 20)

GAUGES = {
    "num_requests_running": "Samples in the running batch.",
    "num_requests_waiting": "Samples waiting for a place in the batch.",
    "kv_cache_usage_perc": "Used fraction of the KV pages, 0 to 1.",
    "saved_states": "States of recurrent layers kept for later prompts.",
}
COUNTERS = {
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens found in the prefix cache.",
    "saved_state_hits": "Samples that went on from a saved state of the recurrent layers.",
    "prompt_tokens": "Prompt tokens computed.",
    "generation_tokens": "Tokens sampled.",
    "spec_decode_num_draft_tokens": "Guessed tokens that were checked.",
    "spec_decode_num_accepted_tokens": "Guessed tokens that were right.",
    "num_preemptions": "Samples that lost their pages and were recomputed.",
}
HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "iteration_tokens_total": ("Tokens computed in a step.", ITERATION_TOKENS),
    "time_to_first_token_seconds": ("Arrival to first token.", TTFT_S),
    "inter_token_latency_seconds": ("Between two tokens of a sample.", ITL_S),
    "request_time_per_output_token_seconds": ("Mean time per output token after the first.", ITL_S),
    "e2e_request_latency_seconds": ("Arrival to last token.", REQUEST_S),
    "request_queue_time_seconds": ("Arrival to first scheduled.", REQUEST_S),
    "request_prefill_time_seconds": ("First scheduled to first token.", REQUEST_S),
    "request_decode_time_seconds": ("First to last token.", REQUEST_S),
    "request_inference_time_seconds": ("First scheduled to last token.", REQUEST_S),
    "request_prompt_tokens": ("Prompt tokens of a finished sample.", TOKENS),
    "request_generation_tokens": ("Sampled tokens of a finished sample.", TOKENS),
    "request_params_n": ("The parameter n.", SAMPLES),
    "request_params_max_tokens": ("The parameter max_tokens, where given.", TOKENS),
}


class Metrics:
    """All metrics of one served model."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(
        self,
        model_name: str,
        cache_config: Mapping[str, object],
        expert_report: Callable[[], ExpertReport | None],
        predictor: str = "off",
        computing: Mapping[str, str] | None = None,
    ) -> None:
        """`cache_config`: facts for cache_config_info; `computing`: for compute_info. `predictor`: the expert cache's
        advisor, or "off"."""
        self.live = LastMinute(expert_report)
        """The last minute, for the dashboard."""
        self.registry = CollectorRegistry()
        labels = {"model_name": model_name, "engine": "0"}
        names, values = list(labels), list(labels.values())
        self._gauges = {
            n: Gauge(PREFIX + n, h, names, registry=self.registry).labels(*values) for n, h in GAUGES.items()
        }
        self._counters = {
            n: Counter(PREFIX + n, h, names, registry=self.registry).labels(*values) for n, h in COUNTERS.items()
        }
        self._histograms = {
            n: Histogram(PREFIX + n, h, names, buckets=b, registry=self.registry).labels(*values)
            for n, (h, b) in HISTOGRAMS.items()
        }
        self._success = Counter(
            PREFIX + "request_success",
            "Finished samples by reason.",
            [*names, "finished_reason"],
            registry=self.registry,
        )
        self._label_values = values
        for reason in FinishReason:  # a rate needs a zero to start from
            self._success.labels(*values, str(reason))
        self._rejections = Counter(
            PREFIX + "admission_rejections", "Requests refused with 503.", [*names, "reason"], registry=self.registry
        )
        info = {**labels, **{name: str(value) for name, value in cache_config.items()}}
        Gauge(PREFIX + "cache_config_info", "The KV pages.", list(info), registry=self.registry).labels(**info).set(1)
        compute = {**labels, **(computing or {})}
        help = "Device, type of activations, instruction set of the C++ kernels and threads."
        Gauge(PREFIX + "compute_info", help, list(compute), registry=self.registry).labels(**compute).set(1)
        self.registry.register(ExpertCollector(self.live, PREFIX, labels, predictor))
        self._disk = PrefixDiskCollector(PREFIX, labels)
        self.registry.register(self._disk)
        self.http = HttpCollector(PREFIX, labels)
        self.registry.register(self.http)
        ProcessCollector(registry=self.registry)

    @cached_property
    def scrape(self) -> Scrape:
        """What /metrics answers."""
        return Scrape(self.render)

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)

    def on_rejected(self, reason: str) -> None:
        """A request found no place in the queue, or no engine."""
        self.live.on_rejected()
        self._rejections.labels(*self._label_values, reason).inc()

    def on_step(self, stats: StepStats) -> None:
        self.live.on_step(stats)
        for name, amount in (
            ("prefix_cache_queries", stats.prefix_queried_tokens),
            ("prefix_cache_hits", stats.prefix_hit_tokens),
            ("saved_state_hits", stats.num_restored_states),
            ("prompt_tokens", stats.num_prompt_tokens),
            ("generation_tokens", stats.num_generated_tokens),
            ("spec_decode_num_draft_tokens", stats.num_drafted_tokens),
            ("spec_decode_num_accepted_tokens", stats.num_accepted_tokens),
            ("num_preemptions", stats.num_preemptions),
        ):
            self._counters[name].inc(amount)
        self._histograms["iteration_tokens_total"].observe(stats.num_prompt_tokens + stats.num_generated_tokens)
        for seconds in stats.time_to_first_token_s:
            self._histograms["time_to_first_token_seconds"].observe(seconds)
        for seconds in stats.inter_token_s:
            self._histograms["inter_token_latency_seconds"].observe(seconds)

    def on_load(self, load: EngineLoad) -> None:
        self.live.on_load(load)
        self._disk.totals = load.disk
        self._gauges["num_requests_running"].set(load.num_running)
        self._gauges["num_requests_waiting"].set(load.num_waiting)
        self._gauges["kv_cache_usage_perc"].set(load.kv_usage_frac)
        self._gauges["saved_states"].set(load.num_saved_states)

    def on_aborted(self, num_samples: int) -> None:
        """Samples ended because their client left, or the server did."""
        self._success.labels(*self._label_values, str(FinishReason.ABORT)).inc(num_samples)

    def on_finished(self, stats: FinishedStats) -> None:
        self.live.on_finished(stats)
        self._success.labels(*self._label_values, str(stats.finish_reason)).inc()
        observed = {
            "e2e_request_latency_seconds": stats.e2e_s,
            "request_queue_time_seconds": stats.queue_s,
            "request_prefill_time_seconds": stats.prefill_s,
            "request_decode_time_seconds": stats.decode_s,
            "request_inference_time_seconds": stats.prefill_s + stats.decode_s,
            "request_prompt_tokens": stats.num_prompt_tokens,
            "request_generation_tokens": stats.num_output_tokens,
            "request_params_n": stats.n,
        }
        if stats.max_tokens is not None:
            observed["request_params_max_tokens"] = stats.max_tokens
        if stats.num_output_tokens > 1:
            observed["request_time_per_output_token_seconds"] = stats.decode_s / (stats.num_output_tokens - 1)
        for name, value in observed.items():
            self._histograms[name].observe(value)
