"""What the server says about its ranks: /ranks, metrics by rank, and a sentence for /health while some are lost.

Knows teams of ranks; a server on one device has none, and then nothing here shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from moe_serve.async_engine import EngineLike
from moe_serve.errors import EngineDeadError
from moe_serve.parallel.team import Team, TeamState

PREFIX = "moe_serve:ep_"


def team_of(engine: EngineLike) -> Team | None:
    """The ranks behind an engine, if it has any."""
    team: Team | None = getattr(engine, "team", None)  # no isinstance: the server imports this before it has torch
    return team


def trouble_of(engine: EngineLike) -> dict[str, Any] | None:
    """What /health says instead of ready; None while every rank is there."""
    team = team_of(engine)
    if team is None or team.state is TeamState.READY:
        return None
    return {"status": str(team.state), "error": team.trouble}


def raise_failure(engine: EngineLike) -> None:
    """EngineDeadError if ranks were lost for good: a launcher that may start everything again must see a failure."""
    team = team_of(engine)
    if team is not None and team.failed:
        raise EngineDeadError(team.trouble)


def install(app: FastAPI, engine: EngineLike, registry: CollectorRegistry) -> None:
    """Add the endpoint and the metrics, where there are ranks."""
    team = team_of(engine)
    if team is None:
        return

    @app.get("/ranks")
    async def ranks() -> dict[str, Any]:
        """Every rank's process, its last sign of life, and what it sent to others."""
        counted = {rank: answer["traffic"] for rank, answer in sorted(team.counted.items())}
        layers = {rank: answer["layer_bytes"] for rank, answer in sorted(team.counted.items())}
        return {**team.describe(), "traffic": counted, "sent_bytes_by_layer": layers}

    registry.register(TeamCollector(team))


class TeamCollector:
    """Reads the team's counts when Prometheus asks."""

    def __init__(self, team: Team) -> None:
        self._team = team

    def collect(self) -> Iterator[Metric]:
        ready = GaugeMetricFamily(PREFIX + "ready", "1 while all ranks are there.")
        ready.add_metric([], float(self._team.state is TeamState.READY))
        yield ready
        starts = CounterMetricFamily(PREFIX + "group_starts", "Times that the ranks were started as a group.")
        starts.add_metric([], self._team.generation)
        yield starts
        sent = CounterMetricFamily(PREFIX + "sent_bytes", "Payload sent to other ranks.", labels=["rank", "kind"])
        rows = CounterMetricFamily(
            PREFIX + "expert_rows", "(token, choice) pairs by where they ran.", labels=["rank", "place"]
        )
        layers = CounterMetricFamily(
            PREFIX + "layer_sent_bytes", "Payload sent to other ranks, by MoE layer.", labels=["rank", "layer"]
        )
        trips = CounterMetricFamily(PREFIX + "trips", "Waits for other ranks, a link's delay each.", labels=["rank"])
        for rank, answer in sorted(self._team.counted.items()):
            trips.add_metric([str(rank)], answer["traffic"]["trips"])
            for name, amount in answer["traffic"].items():
                if name in ("local_rows", "remote_rows"):
                    rows.add_metric([str(rank), name.removesuffix("_rows")], amount)
                elif name.endswith("_bytes") and name != "unmerged_bytes":
                    sent.add_metric([str(rank), name.removesuffix("_bytes")], amount)
            for layer, amount in zip(self._team.layers, answer["layer_bytes"], strict=True):
                layers.add_metric([str(rank), str(layer)], amount)
        yield from (sent, rows, trips, layers)
