"""ScaleConfig: how many engines answer together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moe_serve.config.settings import Settings, option
from moe_serve.errors import ConfigError


@dataclass(frozen=True)
class ScaleConfig(Settings):
    """Replicas of one engine under Ray Serve."""

    HEADING: ClassVar[str] = "Replicas"

    replicas: int = option(2, "Number of engines at first; with --max-replicas also the least.", bound="positive")
    max_replicas: int | None = option(
        None, "Add engines up to this number while requests wait. Default: --replicas, always.", bound="positive"
    )
    target_queue_s: float = option(
        2.0, "With --max-replicas: add engines while requests wait longer than this, in seconds.", bound="positive"
    )
    cpus_per_replica: float = option(1.0, "CPUs that Ray reserves for each engine.", bound="positive")
    gpus_per_replica: float = option(0.0, "GPUs that Ray reserves for each engine.", bound="not negative")
    max_requests_per_replica: int = option(
        256, "Most requests in flight on one engine; further ones wait in the proxy.", bound="positive"
    )
    prefix_max_extra_load: int = option(
        8,
        "A prompt goes to the engine that has its prefix cached, unless that engine has this many requests more than"
        " the least busy one.",
        bound="not negative",
    )
    ray_address: str | None = option(
        None, "Address of a running Ray cluster, or `auto`. Default: a cluster on this machine alone.", metavar="TEXT"
    )

    def check(self) -> None:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ConfigError(f"--max-replicas {self.max_replicas} is below --replicas {self.replicas}")

    def no_effect(self) -> str | None:
        default = type(self).target_queue_s
        if self.max_replicas is None and self.target_queue_s != default:
            return "--target-queue-s has no effect without --max-replicas"
        return None
