"""`moe-serve scale` while it runs: a Ray cluster found or started, the application on it, until a signal ends it."""

from __future__ import annotations

import logging
import signal
import threading

import ray
from ray import serve

from moe_serve.config import EngineConfig, ServerConfig
from moe_serve.config.scale import ScaleConfig
from moe_serve.scale.deploy import build

log = logging.getLogger("moe_serve")

NAME = "moe-serve"


def run_until_told(engine: EngineConfig, server: ServerConfig, scale: ScaleConfig) -> None:
    """Deploy, then wait for SIGTERM or SIGINT. On a cluster that was there before, the application alone is removed."""
    ray.init(address=scale.ray_address, include_dashboard=False, log_to_driver=True)
    serve.start(http_options={"host": server.host, "port": server.port, "location": "EveryNode"})
    serve.run(build(engine, server, scale), name=NAME, route_prefix="/")
    told = threading.Event()  # Ray has handlers of its own until here
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    log.info("serving %d replicas at http://%s:%d", scale.replicas, server.host, server.port)
    told.wait()
    log.info("draining")
    if scale.ray_address is None:
        serve.shutdown()
        ray.shutdown()
    else:
        serve.delete(NAME)
