"""Serving Mixture-of-Experts language models: server, engine, scheduler, command line.

The public names load on first use, so that `import moe_serve.scheduling.sequence`, and with it every
scheduler test, costs no import of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_serve.config import EngineConfig
    from moe_serve.errors import MoEServeError
    from moe_serve.llm import LLM
    from moe_serve.scheduling.sequence import SamplingParams

__version__ = "0.2.0"

__all__ = ["LLM", "EngineConfig", "MoEServeError", "SamplingParams", "__version__"]


def _home_of(name: str) -> str | None:
    """Our module that defines a public name; None if the name is not public."""
    homes = {"LLM": "llm", "EngineConfig": "config", "MoEServeError": "errors", "SamplingParams": "scheduling.sequence"}
    return homes.get(name)


def __getattr__(name: str) -> Any:
    home = _home_of(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
