"""What the user chose about several devices; `EngineConfig` has the rest. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moe_serve.config.settings import Settings, changed_settings, option
from moe_serve.errors import ConfigError


@dataclass(frozen=True)
class ParallelConfig(Settings):
    """Expert parallelism: ranks with a device each."""

    HEADING: ClassVar[str] = "Several devices"

    devices: int = option(
        1, "Number of ranks: processes with a device each, which divide the experts among them.", bound="positive"
    )
    expert_plan: str | None = option(
        None,
        "Placement made by `moe-serve plan`: which rank holds which expert. Default: equal contiguous runs.",
        metavar="FILE",
    )
    ep_mode: str = option(
        "conventional",
        "How tokens meet their experts. conventional: every layer sends a token from its home rank to its experts, and"
        " the results back. coherent: every rank computes every token up to its experts; only their results are sent.",
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
        bound="positive",
    )
    ep_predictor: str | None = option(
        None,
        "File that `moe-serve predictor tokens` made from a trace of this model (.npz): how often each token id used"
        " each expert. A new sequence then lives on the rank that is expected to hold its experts.",
        metavar="FILE",
    )
    expert_plan_interval_s: float | None = option(
        None,
        "Make another placement from recent traffic every N seconds. Default: never.",
        bound="positive",
        aliases=("expert_plan_interval",),
    )
    expert_plan_margin: float = option(
        0.05, "Use another placement only if it saves this share of the traffic between ranks, from 0 to 1."
    )
    expert_plan_window: int = option(
        8192,
        "Keep the routes of this many recent tokens, to make another placement from. 0: none.",
        bound="not negative",
    )
    rank_stall_s: float = option(
        5.0, "A rank counts as lost after this time without a sign of life, in seconds.", bound="positive"
    )
    rank_step_s: float = option(300.0, "Longest time for one step of the ranks, in seconds.", bound="positive")
    rank_start_s: float = option(600.0, "Longest time for all ranks to load and connect, in seconds.", bound="positive")
    rank_port: int = option(
        0,
        "Port on which the front waits for its ranks. 0: a free one, or MASTER_PORT + 1 under a launcher.",
        bound="port",
    )

    def check(self) -> None:
        if self.ep_context == "send":
            raise ConfigError(
                "--ep-context send: sending keys and values has been removed, since it never sent fewer bytes than"
                " --ep-mode conventional with a plan; use --ep-context recompute"
            )
        if self.ep_context not in ("auto", "recompute"):  # auto: the old spelling of the one way that is left
            raise ConfigError(f"--ep-context: {self.ep_context!r} is not recompute")
        if self.devices % self.ep_groups:
            raise ConfigError(f"--ep-groups {self.ep_groups} does not divide --devices {self.devices}")
        if not 0 <= self.expert_plan_margin < 1:
            raise ConfigError(f"--expert-plan-margin must be at least 0 and below 1, got {self.expert_plan_margin}")
        if self.devices == 1 and (self.expert_plan or self.ep_predictor or self.expert_plan_interval_s):
            raise ConfigError(
                "--expert-plan, --expert-plan-interval-s and --ep-predictor divide work among ranks;"
                " give --devices above 1"
            )
        if self.expert_plan_interval_s is not None and self.expert_plan_window == 0:
            raise ConfigError("--expert-plan-interval-s plans from recent traffic; give --expert-plan-window above 0")

    def no_effect(self) -> str | None:
        given = changed_settings(self)
        if self.devices == 1 and given:
            return f"{next(iter(given.values())).flag} has no effect on one device; give --devices above 1"
        if "ep_context" in given and self.ep_mode != "coherent":
            return "--ep-context has no effect without --ep-mode coherent"
        return None

    @property
    def ranks_per_group(self) -> int:
        """Among how many ranks the experts are divided."""
        return self.devices // self.ep_groups

    def group_of(self, rank: int) -> int:
        return rank // self.ranks_per_group
