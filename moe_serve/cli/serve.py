"""`moe-serve serve [MODEL]`: the HTTP server."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from moe_serve.cli import preflight
from moe_serve.cli.flags import add_config_flags, add_model_argument, config_from_args
from moe_serve.config import EngineConfig, ParallelConfig, ServerConfig
from moe_serve.config.settings import refuse_no_effect
from moe_serve.parallel.wire.environment import is_launched, read_place
from moe_serve.server.monitoring import logs
from moe_serve.server.supervisor import supervise

log = logging.getLogger("moe_serve")

HELP = "Serve a model over HTTP, as an OpenAI-compatible API."
USAGE = "[MODEL] [flags]"
CONFIG_HELP = "YAML file with settings: the flags' names, such as `port: 8000`, and `model`. Flags go first."
PRINT_CONFIG_HELP = "Print all settings as YAML, as --config reads them, and end. API keys are left out."
EXAMPLES = (
    "moe-serve serve                                     # the demo model, at http://127.0.0.1:8000",
    "moe-serve serve Qwen/Qwen3-30B-A3B --moe-cache-mib 8000 --moe-prefetch next-gate",
)


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    add_model_argument(parser)
    add_config_flags(parser, EngineConfig, ServerConfig, ParallelConfig, skip=("model",))
    parser.add_argument("--config", metavar="FILE", help=CONFIG_HELP)
    parser.add_argument("--print-config", action="store_true", help=PRINT_CONFIG_HELP)


def run(args: argparse.Namespace) -> int:
    if args.config is not None or args.print_config:
        from moe_serve.cli import config_file

        config_file.merge(args, (EngineConfig, ServerConfig, ParallelConfig))
        if args.print_config:
            configs = (config_from_args(args, config) for config in (EngineConfig, ServerConfig, ParallelConfig))
            print(config_file.as_yaml(*configs))
            return 0
    server, engine = config_from_args(args, ServerConfig), config_from_args(args, EngineConfig)
    if is_launched():  # the first process is the front, the others are ranks
        place = read_place()
        if not place.is_first:
            from moe_serve.parallel.ranks import rank

            return rank.main()
        args.devices = getattr(args, "devices", place.world_size)
    parallel = config_from_args(args, ParallelConfig)
    refuse_no_effect(server, engine, parallel)
    engine = preflight.check_engine(engine)
    port = preflight.check_server(server, parallel)
    logs.set_up(server.log_format)
    if parallel.devices > 1 or is_launched():
        server = server.replace(supervisor=False)
    if server.supervisor:
        server = server.replace(port=port)  # a restart keeps it
        if (status := supervise()) is not None:
            return status
    log.info("importing torch and transformers")
    from moe_serve.server.run import serve

    serve(server, engine, parallel)
    return 0
