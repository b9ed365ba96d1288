"""ExpertCacheConfig: where experts are kept, which ones, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from expert_cache.policies import find_policy, policy_names
from moe_serve.config.settings import Settings, changed_settings, option
from moe_serve.errors import ConfigError

LRU_NAMES = ("affinity", "lru")
"""Policies that a cache managed by the device may stand in for: the default, and what the device does."""


@dataclass(frozen=True)
class ExpertCacheConfig(Settings):
    """The expert cache. Flat names start with `moe_`."""

    PREFIX: ClassVar[str] = "moe_"
    HEADING: ClassVar[str] = "Memory for experts"

    cache_mib: int | None = option(
        None,
        "Memory for experts on the device, in MiB. Experts outside it are read from the checkpoint when needed."
        " 0: no cache; experts are used where the checkpoint is mapped (CPU only)."
        " Default: all experts, or 70 % of free memory if they do not fit.",
        bound="not negative",
    )
    cache_manager: str = option(
        "auto",
        "Who manages the cache. device: the GPU, by least recent use per layer; decoding stays one CUDA graph, and all"
        " experts need pinned host memory. host: this program, with every policy, pool and way of prefetching."
        " auto: device where possible.",
        ("auto", "device", "host"),
    )
    cache_policy: str = option("affinity", "Which experts a host-managed cache keeps.", tuple(policy_names()))
    cache_shadow: str | None = option(
        None, "Policies, separated by commas, whose hits on live traffic are counted for comparison."
    )
    cache_pool: str = option(
        "auto",
        "How layers share the cache. global: one pool. per-layer: equal parts. quota: parts from --moe-cache-profile."
        " adaptive: equal parts, later by traffic if that saves misses."
        " auto: per-layer if a part holds all experts of a token, else global.",
        ("auto", "global", "per-layer", "quota", "adaptive"),
    )
    cache_profile: str | None = option(
        None,
        "Routing trace of this model (.npz, made by `moe-serve trace`), for quotas and for policies that start from"
        " popularity.",
        metavar="FILE",
    )
    prefetch: str = option(
        "off",
        "Read experts ahead of time while the disk or the link is idle; none is evicted for it. next-gate: those that"
        " the next layer's router would choose now. affinity: those that usually follow this layer's."
        " predictor: those that --moe-predictor expects.",
        ("off", "next-gate", "affinity", "predictor"),
    )
    predictor: str | None = option(
        None,
        "File made by `moe-serve predictor train` from a trace of this model, for --moe-prefetch predictor and"
        " --moe-cache-policy predicted.",
        metavar="FILE",
    )
    prefetch_audit: bool = option(
        True, "Time steps with and without prefetching now and then; turn prefetching off where it does not pay."
    )
    page_cache: bool = option(
        False,
        "CPU only: keep checkpoint pages in the page cache; compute missing experts from them when resident."
        " Uses memory beyond --moe-cache-mib.",
    )
    cpu_misses: bool = option(
        False,
        "GPU only: the CPU computes a missing expert of few tokens if that is faster than copying it, as measured at"
        " the start. A token's last bits then depend on which experts were resident.",
    )
    expert_file: str | None = option(
        None, "Read experts from this file, which `moe-serve pack` made of the checkpoint.", metavar="FILE"
    )
    io: str = option(
        "direct",
        "How experts are read from --moe-expert-file. direct: our threads, past the page cache."
        " deepspeed: DeepSpeed's asynchronous I/O, where it is built.",
        ("direct", "deepspeed"),
    )

    def check(self) -> None:
        if self.prefetch == "predictor" and self.predictor is None:
            raise ConfigError("--moe-prefetch predictor needs --moe-predictor, made by `moe-serve predictor train`")
        if self.io == "deepspeed" and self.expert_file is None:
            raise ConfigError("--moe-io deepspeed reads an expert file; give --moe-expert-file")

    def no_effect(self) -> str | None:
        given = changed_settings(self)
        if self.predictor is not None and self.prefetch != "predictor" and not self._policy_forecasts():
            return "--moe-predictor needs --moe-prefetch predictor or --moe-cache-policy predicted to use it"
        if self.prefetch == "off" and not self.prefetch_audit:
            return "--no-moe-prefetch-audit has no effect without --moe-prefetch"
        if self.cache_mib == 0:
            idle = [setting.flag for name, setting in given.items() if name not in ("cache_mib", "expert_file", "io")]
            if idle:
                return f"{idle[0]} has no effect with --moe-cache-mib 0, which means no cache; give a size in MiB"
        return None

    def _policy_forecasts(self) -> bool:
        return find_policy(self.cache_policy).needs == "forecast"

    def needs_host(self) -> str | None:
        """Why a GPU cannot manage the cache by itself, as a sentence; None: it can."""
        if self.cache_policy not in LRU_NAMES:
            return f"the GPU does not have --moe-cache-policy {self.cache_policy}"
        if self.cache_pool not in ("auto", "per-layer"):
            return f"the GPU does not have --moe-cache-pool {self.cache_pool}"
        host_only = ("cache_profile", "cache_shadow", "predictor", "prefetch", "cpu_misses")
        given = [setting.flag for name, setting in changed_settings(self).items() if name in host_only]
        return f"{given[0]} needs a cache that the host manages" if given else None
