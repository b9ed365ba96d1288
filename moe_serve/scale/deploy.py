"""From settings to Ray Serve's application: replicas, their router and autoscaling, and the ingress before them."""

from __future__ import annotations

from functools import partial
from typing import Any

from ray import exceptions, serve
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp

from moe_serve.config import EngineConfig, ServerConfig
from moe_serve.config.scale import ScaleConfig
from moe_serve.scale.autoscaling import IN_FLIGHT, PLACES, QUEUE_S, wanted_replicas
from moe_serve.scale.ingress import Ingress
from moe_serve.scale.replica import Replica
from moe_serve.server.transport.auth import read_keys
from moe_serve.server.transport.guard import guard

QUIET = LoggingConfig(enable_access_log=False)
"""The ingress writes our own access log, with one line a request."""
LOST = (exceptions.RayActorError, exceptions.NodeDiedError, exceptions.WorkerCrashedError, ReplicaUnavailableError)
"""What a request ends with if its replica or its node is gone."""
STARTUP_S = 3600.0
"""A large model loads for minutes; Ray must not take that for a replica that hangs."""
METRICS_S = 5.0
"""A replica that tells its metrics later than this is left out."""
UPSCALE_DELAY_S, DOWNSCALE_DELAY_S = 10.0, 300.0
"""A queue must last this long before a replica is added, and idleness this long before one is given up."""


def build(engine: EngineConfig, server: ServerConfig, scale: ScaleConfig) -> serve.Application:
    """The application for `serve.run`. ConfigError: the API keys cannot be read."""
    keys = read_keys(server)
    replicas = serve.deployment(_RayReplica).options(name="engine", **_replica_options(scale, server))
    door = serve.deployment(_Door).options(
        name="http",
        num_replicas=1,
        max_ongoing_requests=1 << 16,
        ray_actor_options={"num_cpus": 0},
        logging_config=QUIET,
    )
    return door.bind(replicas.bind(engine, server), server, keys)


def _replica_options(scale: ScaleConfig, server: ServerConfig) -> dict[str, Any]:
    options: dict[str, Any] = {
        "max_ongoing_requests": scale.max_requests_per_replica,
        "ray_actor_options": {"num_cpus": scale.cpus_per_replica, "num_gpus": scale.gpus_per_replica},
        "logging_config": QUIET,
        "graceful_shutdown_timeout_s": server.shutdown_timeout_s,
        "health_check_timeout_s": STARTUP_S,
        "request_router_config": RequestRouterConfig(
            request_router_class="moe_serve.scale.router.PrefixRouter",
            request_router_kwargs={"max_extra_load": scale.prefix_max_extra_load},
        ),
    }
    if scale.max_replicas is None:
        return options | {"num_replicas": scale.replicas}
    policy = AutoscalingPolicy(policy_function=partial(by_queue, target_queue_s=scale.target_queue_s))
    return options | {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=scale.replicas,
            max_replicas=scale.max_replicas,
            upscale_delay_s=UPSCALE_DELAY_S,
            downscale_delay_s=DOWNSCALE_DELAY_S,
            policy=policy,
        )
    }


def by_queue(context: AutoscalingContext, target_queue_s: float) -> tuple[int, dict[str, Any]]:
    """Ray Serve's autoscaling policy: `wanted_replicas` of what the replicas reported last."""
    reported = context.aggregated_metrics
    queue_s, in_flight = list(reported.get(QUEUE_S, {}).values()), list(reported.get(IN_FLIGHT, {}).values())
    places = int(min(reported.get(PLACES, {}).values(), default=1))
    wanted = wanted_replicas(context.current_num_replicas, queue_s, in_flight, places, target_queue_s)
    return wanted, {}


class _RayReplica(Replica):
    """Ray waits for this constructor before it sends requests."""

    async def __init__(self, engine: EngineConfig, server: ServerConfig) -> None:  # type: ignore[misc]
        super().__init__(engine, server)
        self.name = serve.get_replica_context().replica_id.unique_id
        await self._app()

    async def __del__(self) -> None:
        await self.close()


@serve.ingress()
class _Door:
    """The ingress with the layers of `moe-serve serve` before it: keys, limits of bodies, sites, access log."""

    def __init__(self, replicas: serve.handle.DeploymentHandle, server: ServerConfig, keys: frozenset[str]) -> None:
        self._replicas, self._server, self._keys = replicas.options(stream=True), server, keys

    def __serve_build_asgi_app__(self) -> ASGIApp:
        door = Ingress(self._replicas.exchange.remote, self._metrics, _is_loss, _is_full)
        return guard(door, self._server, self._keys)

    async def _metrics(self) -> dict[str, str]:
        answers = self._replicas.broadcast("metrics")
        found = await answers.results_async(timeout_s=METRICS_S, return_exceptions=True)
        return dict(text for text in found if not isinstance(text, BaseException))


def _is_loss(error: BaseException) -> bool:
    return isinstance(error, LOST)


def _is_full(error: BaseException) -> bool:
    return isinstance(error, BackPressureError)
