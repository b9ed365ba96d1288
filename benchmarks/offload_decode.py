"""Greedy decoding by moe-serve in offload mode: one prompt, one JSON line on stdout.

    python benchmarks/offload_decode.py FOLDER '{"prompt_ids": [5, 6, 7], "num_tokens": 8, "threads": 2,
        "settings": {"moe_cache_mib": 1100}}'

bench_offload.py runs this as a process of its own, under a memory limit. The physical limit is
missed bytes over the rate of the disk, and that rate is measured here, before and after decoding,
by the reading path that decoding uses: whole experts in random order, one after the other, nothing
computed meanwhile.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from measuring import fix_environment, rss_mb

from moe_serve.openmp import spin_briefly

RATE_EXPERTS = 24
"""Experts read for one measurement of the rate: about half a second of a disk."""


def main() -> None:
    folder, job = sys.argv[1], json.loads(sys.argv[2])
    fix_environment(job["threads"])
    del os.environ["OMP_WAIT_POLICY"]
    spin_briefly(os.environ)  # as `moe-serve serve` does
    import torch
    import transformers  # noqa: F401
    from transformers.models.mixtral import modeling_mixtral  # noqa: F401

    import moe_serve
    import moe_serve.engine.model_runner

    runtime_mb = rss_mb()  # all code, no model
    torch.set_num_threads(job["threads"])
    llm = moe_serve.LLM(folder, max_model_len=256, max_num_seqs=1, num_threads=job["threads"], **job["settings"])
    print(json.dumps(decode(llm, job) | {"runtime_mb": runtime_mb} | memory(llm)))
    sys.stdout.flush()
    os._exit(0)


def decode(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    """The first token comes with the prompt; time and bytes count from there on."""
    from moe_serve import SamplingParams

    cache = llm.engine.runner.experts.cache
    clock = Clock(cache)
    llm.engine.observer = clock
    rates = [read_rate(cache)]
    params = SamplingParams(temperature=0, max_tokens=job["num_tokens"], ignore_eos=True)
    (result,) = llm.generate([job["prompt_ids"]], params)
    rates.append(read_rate(cache))
    done = clock.totals[-1].since(clock.totals[0])
    return {
        "tokens": list(result.completions[0].token_ids),
        "decode_s": clock.times[-1] - clock.times[0],
        "rates": rates,
        "missed_bytes": done.misses * cache.store.expert_bytes,
        "demand_bytes": done.demand_bytes,
        "prefetch_bytes": done.prefetch_bytes,
        "wasted_bytes": done.wasted_bytes,
        "hit_frac": done.hits / (done.hits + done.misses),
        "stall_s": done.stall_s,
    } | {
        name: getattr(clock.usage[-1], name) - getattr(clock.usage[0], name)
        for name in ("ru_utime", "ru_stime", "ru_majflt", "ru_minflt")
    }


class Clock:
    """A StatsObserver that notes the time and the cache's totals after each step."""

    def __init__(self, cache: Any) -> None:
        self.times: list[float] = []
        self.usage: list[resource.struct_rusage] = []
        self.totals: list[Any] = []
        self._cache = cache

    def on_step(self, stats: Any) -> None:
        self.times.append(time.perf_counter())
        self.usage.append(resource.getrusage(resource.RUSAGE_SELF))
        self.totals.append(self._cache.counters.totals())

    def on_load(self, load: Any) -> None:
        """Of no interest."""

    def on_finished(self, stats: Any) -> None:
        """Of no interest."""

    def on_aborted(self, num_samples: int) -> None:
        """Of no interest."""


def read_rate(cache: Any) -> float:
    """Bytes per second of the cache's own Fetcher, reading whole experts into slots' worth of memory."""
    from expert_cache.storage.arena import HostArena
    from expert_cache.storage.fetch import DEMAND, Fetch

    store, arena = cache.store, HostArena(1, cache.store.slot_bytes)
    keys = [(layer, expert) for layer in store.layers for expert in range(store.num_experts)]
    random.Random(0).shuffle(keys)
    seconds = 0.0
    for i, key in enumerate(keys[: RATE_EXPERTS + 1]):
        start = time.perf_counter()
        fetch = Fetch.of(store, key, arena.landing(0), DEMAND)
        cache.fetcher.submit(fetch)
        cache.fetcher.wait_until(lambda f=fetch: f.is_done)
        seconds += time.perf_counter() - start if i else 0.0  # the first one also maps the memory
    arena.release(0)
    return float(RATE_EXPERTS * store.expert_bytes / seconds)


def memory(llm: Any) -> dict[str, Any]:
    """What the model ought to take, and what the process took, in MB."""
    runner = llm.engine.runner
    dense = sum(p.nbytes for p in runner.model.parameters()) + sum(b.nbytes for b in runner.model.buffers())
    cache = runner.experts.cache
    return {
        "budget_mb": cache.num_slots * cache.store.slot_bytes / 1e6,
        "dense_mb": dense / 1e6,
        "kv_mb": runner.kv_cache.num_bytes / 1e6,
        "rss_mb": rss_mb(),
    }


if __name__ == "__main__":
    main()
