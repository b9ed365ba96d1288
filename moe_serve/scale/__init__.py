"""Replicas of one engine under Ray Serve: the same HTTP API from N processes, on one machine or many.

`serve run moe_serve.scale:app model=MODEL replicas=3` deploys them, as `moe-serve scale MODEL --replicas 3` does.

    deploy.py       settings -> Ray Serve's application
    ingress.py      takes HTTP requests, sends each to a replica, relays the answer
    router.py       which replica: Ray Serve's interface for affinity.py
    metrics.py      /metrics of all replicas
    replica.py      one engine with the ordinary HTTP application
    autoscaling.py  how many replicas

Ray does the rest: processes, nodes, proxies, rolling updates, restarts. Only deploy.py, router.py and running.py
know Ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_serve.config import EngineConfig, ServerConfig
from moe_serve.config.scale import ScaleConfig
from moe_serve.config.settings import sort_out
from moe_serve.demo import MODEL

if TYPE_CHECKING:
    from ray.serve import Application

__all__ = ["app"]


def app(arguments: dict[str, str | int | float | bool]) -> Application:
    """Builder for `serve run moe_serve.scale:app NAME=VALUE ...`. Names are those of `moe-serve scale`'s flags.

    Raises ConfigError: an unknown name, or a value that a flag would not take.
    """
    from moe_serve.scale.deploy import build

    values = {name.replace("-", "_"): value for name, value in arguments.items()}
    values.setdefault("model", str(MODEL))
    engine, server, scale = sort_out("serve run", values, EngineConfig, ServerConfig, ScaleConfig)
    return build(EngineConfig.from_dict(engine), ServerConfig.from_dict(server), ScaleConfig.from_dict(scale))
