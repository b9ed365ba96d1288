"""`moe-serve serve`: open the port, load the model behind it, serve until told to stop.

Knows the settings; the endpoints are in app.py, which is imported only while loading: it brings
torch along, and until then /health already says "loading".
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from moe_serve import __version__
from moe_serve.config import EngineConfig, ParallelConfig, ServerConfig, flag_name
from moe_serve.config.model_folder import model_id_of
from moe_serve.demo import MODEL
from moe_serve.errors import ConfigError, EngineDeadError
from moe_serve.resolve import computing
from moe_serve.server.monitoring import logs
from moe_serve.server.transport import serving
from moe_serve.server.transport.auth import read_keys
from moe_serve.server.transport.guard import warn_if_open
from moe_serve.server.transport.listening import bind
from moe_serve.text.parser_names import ParserNames, tool_parser_names

if TYPE_CHECKING:
    from fastapi import FastAPI

    from moe_serve.engine.async_engine import AsyncEngine
    from moe_serve.engine.engine import Engine
    from moe_serve.parallel.front.engine import ParallelEngine
    from moe_serve.server.monitoring.request_spans import Tracing
    from moe_serve.server.service import Service

log = logging.getLogger("moe_serve")


def serve(server_config: ServerConfig, engine_config: EngineConfig, parallel_config: ParallelConfig) -> None:
    """Serve until SIGTERM or SIGINT. ConfigError: the port, the keys or the model cannot be used."""
    logs.set_up(server_config.log_format)
    parsers_of(server_config).check()
    keys = read_keys(server_config)
    warn_if_open(server_config, keys)
    tracing = _tracing(server_config)
    bound = bind(server_config)  # before the slow part, so that a taken port is found at once
    port = bound.getsockname()[1]
    load = partial(_load, server_config, engine_config, parallel_config, port, tracing)
    door = serving.serve_until_told(bound, server_config, keys, load)
    gc.unfreeze()  # see _keep_for_good; what is never collected, some libraries call a leak at the end
    if door.failure is not None:
        raise door.failure
    if door.engine is not None:
        _raise_final_trouble(door.engine)
    if door.is_loading:  # the loading thread would be torn out of torch's code
        sys.stderr.flush()
        os._exit(0)


def _raise_final_trouble(engine: AsyncEngine) -> None:
    """EngineDeadError if ranks were lost for good: a launcher that may start everything again must see a failure."""
    trouble = engine.core.trouble()
    if trouble is not None and trouble.is_final:
        raise EngineDeadError(trouble.message)


def _tracing(config: ServerConfig) -> Tracing | None:
    """Where spans go, if they are wanted. OpenTelemetry is imported only then."""
    endpoint = config.otlp_traces_endpoint
    if endpoint is None:
        return None
    if not endpoint.startswith(("http://", "https://")):
        raise ConfigError(f"{flag_name('otlp_traces_endpoint')}: {endpoint!r} is no URL of OTLP over HTTP")
    try:
        from moe_serve.server.monitoring.otlp import OtlpTracing
    except ImportError as error:
        message = f"{flag_name('otlp_traces_endpoint')} needs OpenTelemetry's SDK ({error.name} is missing)"
        raise ConfigError(f"{message}: pip install 'moe-serve-engine[otel]'") from error
    return OtlpTracing.to(endpoint)


def _load(
    server_config: ServerConfig,
    engine_config: EngineConfig,
    parallel_config: ParallelConfig,
    port: int,
    tracing: Tracing | None,
) -> FastAPI:
    """The application with its engine; runs on a thread while the port already answers."""
    from moe_serve.engine.engine import Engine
    from moe_serve.parallel.front.start import engine_over_ranks

    started = time.monotonic()
    log.info("loading %s", engine_config.model)
    ranks = engine_over_ranks(engine_config, parallel_config)
    engine = ranks or Engine.from_config(engine_config)
    _log_engine(engine, time.monotonic() - started)
    app = _app(engine, server_config, engine_config, tracing, ranks)
    say_how_answers_are_read(app.state.service)
    _keep_for_good()
    _announce(server_config, port, app.state.service.model_name)
    return app


def app_without_port(server_config: ServerConfig, engine_config: EngineConfig) -> FastAPI:
    """The application with its engine, for a client in this process."""
    from moe_serve.engine.engine import Engine

    return _app(Engine.from_config(engine_config), server_config, engine_config)


def _app(
    engine: Engine,
    server_config: ServerConfig,
    engine_config: EngineConfig,
    tracing: Tracing | None = None,
    ranks: ParallelEngine | None = None,
) -> FastAPI:
    from moe_serve.engine.async_engine import AsyncEngine
    from moe_serve.server.app import create_app
    from moe_serve.text.generation_defaults import read_generation_defaults

    return create_app(
        AsyncEngine(engine),
        engine.tokenizer,
        model_name=server_config.served_model_name or model_name_of(engine_config.model),
        model_path=engine_config.model,
        version=__version__,
        sampling_defaults=read_generation_defaults(engine_config.model, engine_config.generation_config),
        log_requests=server_config.log_requests,
        log_stats=not server_config.disable_log_stats,
        with_dashboard=server_config.dashboard,
        recording_dir=server_config.recording_dir,
        recording_buffer_tokens=server_config.recording_buffer_tokens,
        stored_responses_mib=server_config.stored_responses_mib,
        parsers=parsers_of(server_config),
        tracing=tracing,
        ranks=ranks,
    )


def parsers_of(config: ServerConfig) -> ParserNames:
    """How the settings say that answers are read."""
    return ParserNames(config.tool_call_parser, config.reasoning_parser)


def say_how_answers_are_read(service: Service) -> None:
    """A format that is unknown is told now, rather than by the first request with tools."""
    if service.response_template is None and service.tokenizer.hf.chat_template:
        log.info(
            "the chat template shows no answer format that is known here: reasoning stays in the content, and tools are"
            " refused unless tool_choice forces them. %s names a format: %s",
            flag_name("tool_call_parser"),
            ", ".join(tool_parser_names()),
        )


def _keep_for_good() -> None:
    """What was loaded lives as long as the process. Garbage collection need not go through it again and again: a full
    one took 0.2 s, in which every stream waited."""
    gc.collect()
    gc.freeze()


def model_name_of(folder: str) -> str:
    """A model id where the folder is in the hub's cache, else its name; the demo's folder is just called `model`."""
    path = Path(folder).resolve()
    if path == MODEL:
        return "moe-serve-demo"
    return model_id_of(folder) or path.name


def _log_engine(engine: Engine, seconds: float) -> None:
    config = engine.config
    log.info(
        "loaded in %.1f s: %s, %s on %s (%s), %d threads, context %d, %d KV pages of %d tokens, expert cache %d MiB",
        seconds,
        engine.spec.model_type,
        config.dtype,
        config.device,
        computing(config)["instruction_set"],
        config.num_threads,
        engine.max_model_len,
        engine.num_pages,
        engine.page_size,
        config.experts.cache_mib,
    )


def _announce(config: ServerConfig, port: int, name: str) -> None:
    shown = "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host
    url = f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
    log.info("serving %s at %s - try:", name, url)
    body = '{"messages": [{"role": "user", "content": "Hello!"}]}'
    log.info("  curl %s/v1/chat/completions -H 'Content-Type: application/json' -d '%s'", url, body)
    if config.dashboard:
        log.info("  dashboard and chat: %s/dashboard", url)
