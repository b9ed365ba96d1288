"""`moe-serve scale [MODEL]`: replicas of one engine under Ray Serve."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from moe_serve.cli import preflight
from moe_serve.cli.flags import add_config_flags, add_model_argument, config_from_args
from moe_serve.config import EngineConfig, ServerConfig
from moe_serve.config.scale import ScaleConfig
from moe_serve.config.settings import refuse_no_effect
from moe_serve.errors import ConfigError
from moe_serve.server.monitoring import logs

log = logging.getLogger("moe_serve")

HELP = "Serve a model by several engines under Ray Serve, on this machine or a cluster."
USAGE = "[MODEL] [flags]"
CONFIG_HELP = "YAML file with settings: the flags' names, such as `replicas: 3`, and `model`. Flags go first."
EXAMPLES = (
    "moe-serve scale --replicas 3                        # three engines with the demo model, at http://127.0.0.1:8000",
    "moe-serve scale /models/Qwen3-30B-A3B --ray-address auto --gpus-per-replica 1 --replicas 2 --max-replicas 8",
)
CONFIGS = (EngineConfig, ServerConfig, ScaleConfig)


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    add_model_argument(parser)
    add_config_flags(parser, *CONFIGS, skip=("model",))
    parser.add_argument("--config", metavar="FILE", help=CONFIG_HELP)


def run(args: argparse.Namespace) -> int:
    if args.config is not None:
        from moe_serve.cli import config_file

        config_file.merge(args, CONFIGS)
    engine, server = config_from_args(args, EngineConfig), config_from_args(args, ServerConfig)
    scale = config_from_args(args, ScaleConfig)
    refuse_no_effect(engine, server, scale)
    engine = preflight.check_engine(engine)
    logs.set_up(server.log_format)
    try:
        from moe_serve.scale.running import run_until_told
    except ImportError as error:
        raise ConfigError(f"scale needs Ray ({error.name} is missing): pip install 'moe-serve-engine[ray]'") from error
    run_until_told(engine, server, scale)
    return 0
