"""Plain numbers the engine reports about itself; the server turns them into metrics.

Knows nothing of Prometheus and nothing of the engine, so both sides can depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from expert_cache.report import ExpertTotals
from moe_serve.scheduling.finish import FinishedStats


@dataclass(frozen=True, slots=True)
class StepStats:
    """One engine step."""

    duration_s: float
    num_prompt_tokens: int
    """Prompt tokens computed in this step (recomputation after preemption included)."""
    num_generated_tokens: int
    """Tokens sampled in this step."""
    num_preemptions: int
    """Sequences preempted by this step."""
    prefix_queried_tokens: int
    """Prompt tokens looked up in the prefix cache in this step."""
    prefix_hit_tokens: int
    """Of those, the ones found."""
    inter_token_s: tuple[float, ...]
    """For each sequence that got a token and had one before: seconds since its previous token."""
    time_to_first_token_s: tuple[float, ...]
    """For each sequence that got its first token: seconds since its request arrived."""
    experts: ExpertTotals = field(default_factory=ExpertTotals)
    """What the expert cache did in this step."""
    num_drafted_tokens: int = 0
    """Guesses that this step checked."""
    num_accepted_tokens: int = 0
    """Of those, the ones that were right."""
    num_restored_states: int = 0
    """Sequences that went on from a saved state of the recurrent layers."""


@dataclass(slots=True)
class DiskTotals:
    """What the prefix cache on disk has done so far; any thread may read it."""

    num_bytes: int = 0
    """On disk now."""
    written_bytes: int = 0
    read_bytes: int = 0
    refused_files: int = 0
    """Damaged or foreign ones."""
    hit_tokens: int = 0
    """Prompt tokens that were loaded instead of computed."""


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What the engine holds right now; reported whenever it may have changed, aborts included."""

    num_running: int
    """Samples in the batch."""
    num_waiting: int
    kv_usage_frac: float
    """Used fraction of the KV pages; cached but unreferenced pages count as free."""
    num_saved_states: int = 0
    """States of recurrent layers that are kept for later prompts."""
    disk: DiskTotals = field(default_factory=DiskTotals)
    """What the prefix cache on disk has done so far; it changes while it is held."""


class StatsObserver(Protocol):
    """Whatever wants to hear about steps; called on the engine thread, so it must be quick."""

    def on_step(self, stats: StepStats) -> None: ...

    def on_load(self, load: EngineLoad) -> None: ...

    def on_finished(self, stats: FinishedStats) -> None: ...
    def on_aborted(self, num_samples: int) -> None: ...
