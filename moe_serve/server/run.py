"""`moe-serve serve`: load the model, then open the port. /health therefore answers only when ready.

Knows uvicorn and logging; the endpoints are in app.py.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import time
from pathlib import Path

import uvicorn

from moe_serve import __version__
from moe_serve.async_engine import AsyncEngine
from moe_serve.config import EngineConfig, ServerConfig, flag_name
from moe_serve.engine import Engine
from moe_serve.errors import ConfigError, EngineDeadError
from moe_serve.generation_defaults import read_generation_defaults
from moe_serve.parallel.config import ParallelConfig
from moe_serve.parallel.start import make_engine
from moe_serve.server import ranks
from moe_serve.server.app import create_app

log = logging.getLogger("moe_serve")


def serve(server_config: ServerConfig, engine_config: EngineConfig, parallel_config: ParallelConfig) -> None:
    """Serve until SIGINT or SIGTERM; requests in flight get a few seconds to finish."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    bound = _bind(server_config)  # before the slow part, so that a taken port is found at once
    started = time.monotonic()
    log.info("loading %s", engine_config.model)
    engine = make_engine(engine_config, parallel_config)
    _log_engine(engine, time.monotonic() - started)
    name = server_config.served_model_name or model_name_of(engine_config.model)
    app = create_app(
        AsyncEngine(engine),
        engine.tokenizer,
        model_name=name,
        model_path=engine_config.model,
        version=__version__,
        sampling_defaults=read_generation_defaults(engine_config.model, engine_config.generation_config),
    )
    server = uvicorn.Server(
        uvicorn.Config(app, log_level=server_config.uvicorn_log_level, timeout_graceful_shutdown=10, access_log=False)
    )
    _announce(server_config.host, bound.getsockname()[1], name)
    asyncio.run(server.serve(sockets=[bound]))
    team = ranks.team_of(engine)
    if team is not None and team.failed:  # a launcher that may start everything again must see a failure
        raise EngineDeadError(team.trouble)


def model_name_of(folder: str) -> str:
    """The folder's name; the embedded demo's folder is just called `model`."""
    path = Path(folder).resolve()
    return "moe-serve-demo" if path == Path(__file__).resolve().parents[1] / "demo" / "model" else path.name


def _bind(config: ServerConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((config.host, config.port))
    except OSError as error:
        bound.close()
        message = f"cannot listen on {config.host} port {config.port} ({error.strerror}); choose another"
        raise ConfigError(f"{message} with {flag_name('port')}") from error
    return bound


def _log_engine(engine: Engine, seconds: float) -> None:
    config = engine.config
    log.info(
        "loaded in %.1f s: %s, %s on %s, %d threads, context %d, %d KV pages of %d tokens, expert cache %d MiB",
        seconds,
        engine.spec.model_type,
        config.dtype,
        config.device,
        config.num_threads,
        engine.max_model_len,
        engine.num_pages,
        engine.block_size,
        config.moe_cache_mib,
    )


def _announce(host: str, port: int, name: str) -> None:
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    url = f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
    log.info("serving %s at %s - try:", name, url)
    body = '{"messages": [{"role": "user", "content": "Hello!"}]}'
    log.info("  curl %s/v1/chat/completions -H 'Content-Type: application/json' -d '%s'", url, body)
