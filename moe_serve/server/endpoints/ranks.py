"""GET /ranks: every rank's process, traffic and experts; and the metrics by rank.

Knows teams of ranks; a server on one device has none, and then nothing here shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, FastAPI
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from expert_cache.report import ExpertReport
from moe_serve.parallel.front.reports import TeamReports
from moe_serve.parallel.front.team import Team, TeamState
from moe_serve.server.endpoints.bodies.given import TheService

PREFIX = "moe_serve:ep_"

router = APIRouter()


def add(app: FastAPI, service: TheService) -> None:
    """The endpoint and the metrics, where there are ranks."""
    if service.ranks is not None:
        app.include_router(router)
        service.metrics.registry.register(TeamCollector(service.ranks.team, service.ranks.expert_reports))


@router.get("/ranks")
async def ranks(service: TheService) -> dict[str, Any]:
    """Every rank's process, its last sign of life, what it sent to others, and by layer what its experts did."""
    engine = service.ranks
    assert engine is not None
    counted = sorted(engine.team.counted.items())
    return {
        **engine.team.describe(),
        "placements": engine.num_placements,
        "traffic": {rank: each.traffic for rank, each in counted},
        "sent_bytes_by_layer": {rank: each.layer_bytes for rank, each in counted},
        "experts": {rank: _experts(report) for rank, report in engine.expert_reports.by_rank().items()},
    }


def _experts(report: ExpertReport) -> dict[str, Any]:
    """One rank's experts since it started."""
    residency, counts = report.residency, report.counts
    return {
        "tokens": report.tokens.sum(axis=1).tolist(),
        "resident": residency.ready.sum(axis=1).tolist(),
        "num_slots": residency.num_slots,
        "used_bytes": residency.used_bytes,
        "hits": int(counts["hits"].sum()),
        "misses": int(counts["misses"].sum()),
        "stall_s": round(float(counts["stall_s"].sum()), 3),
        "belady_gap_frac": report.belady_gap_frac,
    }


class TeamCollector:
    """Reads the team's counts when Prometheus asks."""

    def __init__(self, team: Team, reports: TeamReports) -> None:
        self._team = team
        self._reports = reports

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
        for rank, counted in sorted(self._team.counted.items()):
            trips.add_metric([str(rank)], counted.traffic["trips"])
            for name, amount in counted.traffic.items():
                if name in ("local_rows", "remote_rows"):
                    rows.add_metric([str(rank), name.removesuffix("_rows")], amount)
                elif name.endswith("_bytes") and name != "unmerged_bytes":
                    sent.add_metric([str(rank), name.removesuffix("_bytes")], amount)
            for layer, amount in zip(self._team.layers, counted.layer_bytes, strict=True):
                layers.add_metric([str(rank), str(layer)], amount)
        yield from (sent, rows, trips, layers, self._expert_tokens())

    def _expert_tokens(self) -> Metric:
        """By where they were computed: how evenly the placement loads the ranks."""
        family = CounterMetricFamily(
            PREFIX + "expert_tokens", "(token, choice) pairs computed by this rank's experts.", labels=["rank"]
        )
        for rank, report in self._reports.by_rank().items():
            family.add_metric([str(rank)], int(report.tokens.sum()))
        return family
