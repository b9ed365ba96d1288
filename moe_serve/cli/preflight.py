"""What can be known to fail before torch is imported, which takes seconds: folders, files, families, sizes, the port.

Each check repeats one that the engine makes with full knowledge; here it only comes earlier.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from moe_serve.config import EngineConfig, ParallelConfig, ServerConfig
from moe_serve.config.model_folder import read_config_json, refuse_mlx
from moe_serve.config.settings import Settings, settings_of
from moe_serve.config.units import MIB
from moe_serve.errors import CheckpointError, ConfigError
from moe_serve.hf.families import refuse_unknown_family
from moe_serve.hub.find import find_model
from moe_serve.server.transport.listening import bind
from moe_serve_base.safetensors_header import read_header

EXPERT = re.compile(r"layers\.(?P<layer>\d+)\.(?:.*\.)?experts\.(?P<expert>\d+)\.")
"""A tensor of one routed expert. Tensors of all experts of a layer together are not looked at."""
NARROWING = 2
"""A slot takes at least half of the stored bytes: float32 weights may be kept in 16 bits."""


def check_model(name: str, revision: str | None = None, offline: bool = False) -> str:
    """The checkpoint folder for MODEL, of a supported family and with weights, downloaded if it is a model id that is
    not here. ConfigError and its subclasses."""
    folder = find_model(name, revision, offline)
    fields = read_config_json(folder)
    refuse_mlx(fields, f"{folder}/config.json")
    refuse_unknown_family(fields)
    return folder


def model_of(args: argparse.Namespace) -> str:
    """`check_model` of a command's MODEL, --revision and --offline."""
    return check_model(args.model, getattr(args, "revision", None), getattr(args, "offline", False))


def check_engine(config: EngineConfig) -> EngineConfig:
    """`config` with its model as a folder. ConfigError and its subclasses say what is missing."""
    check_files(config)
    config = config.replace(model=check_model(config.model, config.revision, config.offline))
    budget = config.experts.cache_mib
    if budget:
        least = _least_expert_bytes(Path(config.model))
        if budget * MIB < least:
            raise ConfigError(
                f"--moe-cache-mib {budget} does not hold a single expert; give at least {-(-least // MIB)}"
            )
    return config


def check_server(server: ServerConfig, parallel: ParallelConfig) -> int:
    """Key file, plan files and the port, which is returned: a free one for port 0."""
    check_files(server)
    check_files(parallel)
    with bind(server) as bound:
        port: int = bound.getsockname()[1]
    return port


def check_files(config: Settings) -> None:
    """ConfigError where a setting names a file that is not there."""
    for setting in settings_of(type(config)):
        home: Any = config if setting.part is None else getattr(config, setting.part)
        name = getattr(home, setting.field.name)
        if setting.metavar == "FILE" and name is not None and not Path(name).is_file():
            raise ConfigError(f"{setting.flag}: there is no file {name}")


def say_importing() -> None:
    """To a person who waits at a terminal."""
    if sys.stderr.isatty():
        print("importing torch and transformers ...", file=sys.stderr, flush=True)


def _least_expert_bytes(folder: Path) -> int:
    """Fewest bytes that a slot for one expert takes, from the first file's header; 0 where that does not tell."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            header, _ = read_header(file)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: {error}") from error
        sizes: Counter[str] = Counter()
        for name, tensor in header.items():
            match = EXPERT.search(name)
            if match:
                start, end = tensor["data_offsets"]
                sizes[f"{match['layer']}.{match['expert']}"] += end - start
        if sizes:
            return max(sizes.values()) // NARROWING
    return 0
