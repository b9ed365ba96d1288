"""What the user chose about several devices; `EngineConfig` has the rest. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass

from moe_serve.config import FromDict, option
from moe_serve.errors import ConfigError


@dataclass(frozen=True)
class ParallelConfig(FromDict):
    """Expert parallelism."""

    devices: int = option(1, "Ranks: processes with a device each, which divide the experts among them.")
    expert_plan: str | None = option(
        None, "Placement made by `moe-serve plan`: which rank holds which expert. Default: equal contiguous runs."
    )
    ep_mode: str = option(
        "conventional",
        "How tokens meet their experts. conventional: they go out and the results come back, each layer."
        " coherent: while decoding, a token stays where its expert ran, and every rank holds the whole KV cache.",
        ("conventional", "coherent"),
    )
    ep_context: str = option(
        "auto",
        "With --ep-mode coherent, how ranks come by each other's part of the context. send: as keys and values."
        " recompute: from hidden states, every rank computing every token. auto: what sends less.",
        ("auto", "send", "recompute"),
    )
    ep_groups: int = option(
        1,
        "Divide the ranks into so many groups, each with all experts among its ranks: sequences stay in one group."
        " The plan is then one for as many devices as a group has ranks.",
    )
    ep_predictor: str | None = option(
        None,
        "Table of the experts that each token id used (.npz): sequences and tokens start on the rank that is"
        " expected to hold their experts.",
    )
    rank_stall_s: float = option(5.0, "A rank that gives no sign of life for so many seconds counts as lost.")
    rank_step_s: float = option(300.0, "Longest time in seconds that one step of the ranks may take.")
    rank_start_s: float = option(600.0, "Longest time in seconds for all ranks to load and connect.")
    rank_port: int = option(
        0, "Port on which the front waits for its ranks; 0 picks a free one, or MASTER_PORT + 1 under a launcher."
    )

    def __post_init__(self) -> None:
        if self.devices < 1:
            raise ConfigError(f"--devices must be at least 1, got {self.devices}")
        if self.ep_mode not in ("conventional", "coherent"):
            raise ConfigError(f"--ep-mode: {self.ep_mode!r} is not one of conventional, coherent")
        if self.ep_context not in ("auto", "send", "recompute"):
            raise ConfigError(f"--ep-context: {self.ep_context!r} is not one of auto, send, recompute")
        if self.ep_groups < 1 or self.devices % self.ep_groups:
            raise ConfigError(f"--ep-groups {self.ep_groups} does not divide --devices {self.devices}")
        for name in ("rank_stall_s", "rank_step_s", "rank_start_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"--{name.replace('_', '-')} must be positive, got {getattr(self, name)}")
        if self.devices == 1 and (self.expert_plan or self.ep_predictor):
            raise ConfigError("--expert-plan and --ep-predictor divide work among ranks; give --devices above 1")

    @property
    def ranks_per_group(self) -> int:
        """Among how many ranks the experts are divided."""
        return self.devices // self.ep_groups

    def group_of(self, rank: int) -> int:
        return rank // self.ranks_per_group
