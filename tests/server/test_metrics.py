"""The metrics' names, and that they move."""

from __future__ import annotations

from typing import Any

from prometheus_client.parser import text_string_to_metric_families

COUNTERS = (
    *("prefix_cache_queries", "prefix_cache_hits", "prompt_tokens", "generation_tokens", "num_preemptions"),
    *("expert_cache_queries", "expert_cache_hits", "expert_cache_prefetch_hits", "expert_cache_late_prefetches"),
    *("expert_cache_evictions", "expert_load_bytes", "expert_prefetch_bytes", "expert_wasted_bytes"),
    *("expert_read_errors", "expert_stall_seconds", "request_success", "admission_rejections"),
)
GAUGES = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "cache_config_info",
    *("expert_cache_belady_gap_perc", "expert_shadow_hits"),
)
HISTOGRAMS = (
    *("iteration_tokens_total", "time_to_first_token_seconds", "inter_token_latency_seconds"),
    *("request_time_per_output_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"),
    *("request_prefill_time_seconds", "request_decode_time_seconds", "request_inference_time_seconds"),
    *("request_prompt_tokens", "request_generation_tokens", "request_params_n", "request_params_max_tokens"),
)
GOOD = ("/v1/completions", {"prompt": [5, 6, 7, 8], "max_tokens": 5})


def scrape(served: Any, *posts: Any) -> dict[str, float]:
    """Values by name after these posts; labels other than the reason left out."""
    text = served.talk(*posts, ("/metrics", None))[-1].text
    values = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels["model_name"] == "fake-model"
            assert sample.labels["engine"] == "0"
            reason = sample.labels.get("finished_reason") or sample.labels.get("reason") or ""
            values[f"{sample.name.removeprefix('moe_serve:')}{reason and '/' + reason}"] = sample.value
    return values


def test_vllms_names_are_all_there_from_the_start(served: Any) -> None:
    text = served.talk(("/metrics", None))[0].text
    kinds = {f.name.removeprefix("moe_serve:"): f.type for f in text_string_to_metric_families(text)}
    kinds = {name: kind for name, kind in kinds.items() if not name.endswith("_created")}
    expected = {n: "counter" for n in COUNTERS} | {n: "gauge" for n in GAUGES} | {n: "histogram" for n in HISTOGRAMS}
    assert kinds == expected


def test_counters_move(served: Any) -> None:
    values = scrape(served, GOOD, GOOD)
    assert values["prompt_tokens_total"] == 8
    assert values["generation_tokens_total"] == 10
    assert values["prefix_cache_hits_total"] == 4
    assert values["expert_cache_queries_total"] == 40
    assert values["expert_cache_hits_total"] == 30
    assert values["expert_load_bytes_total"] == 5000
    assert values["expert_stall_seconds_total"] == 2.5
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
