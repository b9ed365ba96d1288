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
        "How tokens meet their experts. conventional: each token has one home rank; in every layer it is sent to its"
        " experts and their results come back. coherent: every rank computes every token up to its experts, and only"
        " the experts' results are sent.",
        ("conventional", "coherent"),
    )
    ep_context: str = option(
        "recompute",
        "With --ep-mode coherent: how every rank gets the keys and values of every token. recompute, the only way:"
        " each rank computes them itself.",
    )
    ep_groups: int = option(
        1,
        "Split the ranks into N groups; every group holds all experts, and a sequence stays in its group."
        " The plan is then for one group: as many devices as a group has ranks.",
    )
    ep_predictor: str | None = option(
        None,
        "File that `moe-serve predictor tokens` made from a trace of this model (.npz): how often each token id used"
        " each expert. A new sequence then lives on the rank that is expected to hold its experts.",
    )
    expert_plan_interval: float | None = option(
        None, "Seconds after which another placement is made from recent traffic, again and again. Default: never."
    )
    expert_plan_margin: float = option(
        0.05, "Share of the traffic between ranks that another placement must save; one that saves less is not used."
    )
    expert_plan_window: int = option(
        8192, "Tokens of recent traffic whose routes are kept to make another placement from. 0: none are kept."
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
        self._check_context()
        if self.ep_groups < 1 or self.devices % self.ep_groups:
            raise ConfigError(f"--ep-groups {self.ep_groups} does not divide --devices {self.devices}")
        for name in ("rank_stall_s", "rank_step_s", "rank_start_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"--{name.replace('_', '-')} must be positive, got {getattr(self, name)}")
        if self.devices == 1 and (self.expert_plan or self.ep_predictor or self.expert_plan_interval):
            raise ConfigError(
                "--expert-plan, --expert-plan-interval and --ep-predictor divide work among ranks;"
                " give --devices above 1"
            )
        self._check_replacement()

    def _check_context(self) -> None:
        """`auto` is the old spelling of the one way that is left."""
        if self.ep_context == "send":
            raise ConfigError(
                "--ep-context send: sending keys and values has been removed, since it never sent fewer bytes than"
                " --ep-mode conventional with a plan; use --ep-context recompute"
            )
        if self.ep_context not in ("auto", "recompute"):
            raise ConfigError(f"--ep-context: {self.ep_context!r} is not recompute")

    def _check_replacement(self) -> None:
        if self.expert_plan_interval is not None and self.expert_plan_interval <= 0:
            raise ConfigError(f"--expert-plan-interval must be positive, got {self.expert_plan_interval}")
        if not 0 <= self.expert_plan_margin < 1:
            raise ConfigError(f"--expert-plan-margin must be at least 0 and below 1, got {self.expert_plan_margin}")
        if self.expert_plan_window < 0:
            raise ConfigError(f"--expert-plan-window must not be negative, got {self.expert_plan_window}")
        if self.expert_plan_interval is not None and self.expert_plan_window == 0:
            raise ConfigError("--expert-plan-interval plans from recent traffic; give --expert-plan-window above 0")

    @property
    def ranks_per_group(self) -> int:
        """Among how many ranks the experts are divided."""
        return self.devices // self.ep_groups

    def group_of(self, rank: int) -> int:
        return rank // self.ranks_per_group
