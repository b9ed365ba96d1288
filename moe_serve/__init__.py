"""Serving Mixture-of-Experts language models: server, engine, scheduler, command line.

The public names load on first use, so that `import moe_serve.scheduling.sequence`, and with it every
scheduler test, costs no import of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_serve.async_llm import AsyncLLM
    from moe_serve.config import EngineConfig, ExpertCacheConfig, KVConfig, ParallelConfig, QueueConfig
    from moe_serve.errors import ConfigError, InvalidRequestError, MoEServeError
    from moe_serve.llm import LLM, RequestResult
    from moe_serve.scheduling.sequence import Completion, SampleOutput, SamplingParams, TokenLogprob

__version__ = "0.2.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "Completion",
    "ConfigError",
    "EngineConfig",
    "ExpertCacheConfig",
    "InvalidRequestError",
    "KVConfig",
    "MoEServeError",
    "ParallelConfig",
    "QueueConfig",
    "RequestResult",
    "SampleOutput",
    "SamplingParams",
    "TokenLogprob",
    "__version__",
]


def _home_of(name: str) -> str | None:
    """Our module that defines a public name; None if the name is not public."""
    homes = {
        "async_llm": ("AsyncLLM",),
        "config": ("EngineConfig", "ExpertCacheConfig", "KVConfig", "ParallelConfig", "QueueConfig"),
        "errors": ("ConfigError", "InvalidRequestError", "MoEServeError"),
        "llm": ("LLM", "RequestResult"),
        "scheduling.sequence": ("Completion", "SampleOutput", "SamplingParams", "TokenLogprob"),
    }
    return next((home for home, names in homes.items() if name in names), None)


def __getattr__(name: str) -> Any:
    home = _home_of(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
