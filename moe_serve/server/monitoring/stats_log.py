"""A log line about throughput every ten seconds in which anything ran. A StatsObserver before another one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from moe_serve.scheduling.finish import FinishedStats
from moe_serve.scheduling.stats import EngineLoad, StatsObserver, StepStats
from moe_serve.server.monitoring.logs import FIELDS

log = logging.getLogger(__name__)

INTERVAL_S = 10.0


class StatsLog:
    """Adds up steps and passes everything on; called on the engine thread."""

    def __init__(self, observer: StatsObserver, clock: Callable[[], float] = time.monotonic) -> None:
        self._observer = observer
        self._clock = clock
        self._load = EngineLoad(0, 0, 0.0)
        self._since_s = clock()
        self._prompt_tokens = self._generated_tokens = self._expert_hits = self._expert_uses = 0.0

    def on_step(self, stats: StepStats) -> None:
        self._prompt_tokens += stats.num_prompt_tokens
        self._generated_tokens += stats.num_generated_tokens
        self._expert_hits += stats.experts.hits
        self._expert_uses += stats.experts.hits + stats.experts.misses
        self._observer.on_step(stats)

    def on_load(self, load: EngineLoad) -> None:
        self._load = load
        self._observer.on_load(load)
        elapsed_s = self._clock() - self._since_s
        if elapsed_s >= INTERVAL_S:
            self._write(elapsed_s)

    def on_finished(self, stats: FinishedStats) -> None:
        self._observer.on_finished(stats)

    def on_aborted(self, num_samples: int) -> None:
        self._observer.on_aborted(num_samples)

    def _write(self, elapsed_s: float) -> None:
        fields = {
            "prompt_tokens_per_s": round(self._prompt_tokens / elapsed_s, 1),
            "generated_tokens_per_s": round(self._generated_tokens / elapsed_s, 1),
            "running": self._load.num_running,
            "waiting": self._load.num_waiting,
            "kv_usage_perc": round(100 * self._load.kv_usage_frac, 1),
        }
        if self._expert_uses:
            fields["expert_hit_perc"] = round(100 * self._expert_hits / self._expert_uses, 1)
        log.info("throughput", extra={FIELDS: fields})
        self._since_s = self._clock()
        self._prompt_tokens = self._generated_tokens = self._expert_hits = self._expert_uses = 0.0
