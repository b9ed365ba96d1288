"""What `moe-serve tune` found out, kept in one JSON file per GPU model in the user's cache directory.

Knows files and configurations; measuring is tuning.py's.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_serve_kernels.gpu.configs import Config, Gemv, GemvConfig, GroupedConfig, Tile
from moe_serve_kernels.gpu.weight_format import Format

log = logging.getLogger(__name__)
VERSION = 1


@dataclass(frozen=True, slots=True)
class Shape:
    """One model's MoE layer."""

    hidden: int
    inner: int
    num_experts: int
    top_k: int
    format: Format

    @property
    def key(self) -> str:
        return f"h{self.hidden}-i{self.inner}-e{self.num_experts}-k{self.top_k}-{self.format}"


Tuned = dict[str, dict[int, Config]]
"""Shape.key -> most tokens -> configuration."""


def path_of(device_name: str) -> Path:
    """Where a GPU model's results are kept: under XDG_CACHE_HOME, or ~/.cache."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "moe-serve" / "kernels" / (re.sub(r"\W+", "-", device_name).strip("-").lower() + ".json")


@functools.cache
def load(device_name: str) -> Tuned:
    """All that was tuned for a GPU model; nothing, with a warning, if the file cannot be used."""
    path = path_of(device_name)
    try:
        return read(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AssertionError) as error:
        log.warning("%s is ignored (%s: %s); run `moe-serve tune` again", path, type(error).__name__, error)
        return {}


def read(path: Path) -> Tuned:
    """OSError, or ValueError, TypeError and KeyError for what is no such file."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    if stored["version"] != VERSION:
        raise ValueError(f"version {stored['version']} instead of {VERSION}")
    return {
        shape: {int(tokens): _decoded(config) for tokens, config in by_tokens.items()}
        for shape, by_tokens in stored["shapes"].items()
    }


def write(path: Path, tuned: Tuned) -> None:
    """Replace the file in one step."""
    shapes = {
        shape: {str(tokens): dataclasses.asdict(config) for tokens, config in by_tokens.items()}
        for shape, by_tokens in tuned.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"version": VERSION, "shapes": shapes}, indent=1) + "\n", encoding="utf-8")
    new.replace(path)


def find(tuned: Tuned, shape: Shape, num_tokens: int) -> Config | None:
    """The configuration tuned for the smallest number of tokens that is not below this one; None beyond the largest."""
    by_tokens = tuned.get(shape.key, {})
    fitting = [tokens for tokens in by_tokens if tokens >= num_tokens]
    return by_tokens[min(fitting)] if fitting else None


def _decoded(stored: dict[str, Any]) -> Config:
    if "block_t" in stored["gate_up"]:
        return GroupedConfig(Tile(**stored["gate_up"]), Tile(**stored["down"]))
    return GemvConfig(Gemv(**stored["gate_up"]), Gemv(**stored["down"]))
