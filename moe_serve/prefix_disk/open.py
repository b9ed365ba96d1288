"""Opens the prefix cache on disk that settings ask for, and says what its files depend on."""

from __future__ import annotations

import importlib.metadata
import logging
from dataclasses import dataclass
from pathlib import Path

from moe_serve.config import EngineConfig
from moe_serve.config.units import MIB
from moe_serve.errors import ConfigError
from moe_serve.execution.kv_cache import KVCache
from moe_serve.execution.state_cache import StateCache
from moe_serve.hf.checkpoint import weight_files
from moe_serve.prefix_disk.files import VERSION
from moe_serve.prefix_disk.fingerprint import fingerprint
from moe_serve.prefix_disk.folder import PrefixFolder
from moe_serve.prefix_disk.tensors import PageBytes
from moe_serve.prefix_disk.tier import DiskTier
from moe_serve.resolve import computing
from moe_serve.scheduling.kv_pages import PagePool
from moe_serve.scheduling.prefixes import Prefixes

log = logging.getLogger(__name__)

PACKAGES = ("moe-serve-engine", "torch", "transformers")
"""Whose versions may change a bit."""


@dataclass(frozen=True, slots=True)
class PrefixFacts:
    """What a loaded model's pages are."""

    config: EngineConfig
    """Resolved."""
    kv_cache: KVCache
    states: StateCache


def open_tier(facts: PrefixFacts, pool: PagePool, prefixes: Prefixes) -> DiskTier | None:
    """The cache in --prefix-cache-dir; None without one. ConfigError if the folder cannot be used."""
    kv = facts.config.kv
    if kv.prefix_cache_dir is None or not kv.enable_prefix_caching:
        return None
    try:
        folder = PrefixFolder(Path(kv.prefix_cache_dir), _fingerprint(facts), kv.prefix_cache_disk_mib * MIB)
    except OSError as error:
        raise ConfigError(f"--prefix-cache-dir {kv.prefix_cache_dir}: {error.strerror}") from error
    log.info("prefix cache on disk: %d MiB in %s", folder.totals.num_bytes // MIB, folder.path)
    return DiskTier(folder, PageBytes(facts.kv_cache, facts.states, kv.page_size), pool, prefixes)


def _fingerprint(facts: PrefixFacts) -> bytes:
    """Of everything that changes a bit of a page."""
    config = facts.config
    how = {name: value for name, value in computing(config).items() if name != "threads"}
    settings: dict[str, object] = {
        "format": VERSION,
        "page_size": config.kv.page_size,
        "state_block_size": config.kv.state_block_size,
        "max_model_len": config.max_model_len,
        "enforce_eager": config.enforce_eager,
        "pages": [[str(t.shape[::2]) for t in layer.tensors] for layer in facts.kv_cache.layers.values()],
        "states": [[str(t.shape[1:]) for t in layer.values()] for layer in facts.states.layers.values()],
        "versions": [_version(name) for name in PACKAGES],
    }
    expert_file = config.experts.expert_file
    files = [*weight_files(config.model), *([Path(expert_file)] if expert_file else [])]
    described = Path(config.model) / "config.json"
    return fingerprint([*files, *([described] if described.is_file() else [])], {**how, **settings})


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
