"""What the user chose: frozen settings, one help text per field, shared by flags, keywords and errors.

    EngineConfig            model, device, batching
    ├── kv: KVConfig            memory for keys and values
    ├── experts: ExpertCacheConfig  which experts are where
    ├── queue: QueueConfig      who may wait, and for how long
    └── speculation: SpeculationConfig  guesses of next tokens
    ServerConfig            HTTP
    ParallelConfig          several devices

Flag names are vLLM's where vLLM has one. "auto" stays "auto" here; `resolve` in moe_serve/resolve.py returns a new
config with numbers, once the model and the hardware are known. Knows no torch, no transformers.
"""

from __future__ import annotations

from moe_serve.config.engine import EngineConfig
from moe_serve.config.experts import ExpertCacheConfig
from moe_serve.config.kv import KVConfig
from moe_serve.config.parallel import ParallelConfig
from moe_serve.config.queue import QueueConfig
from moe_serve.config.server import ServerConfig
from moe_serve.config.settings import Settings, flag_name, option
from moe_serve.config.speculation import SpeculationConfig

__all__ = [
    "EngineConfig",
    "ExpertCacheConfig",
    "KVConfig",
    "ParallelConfig",
    "QueueConfig",
    "ServerConfig",
    "Settings",
    "SpeculationConfig",
    "flag_name",
    "option",
]
