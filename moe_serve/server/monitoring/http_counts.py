"""HttpCounts: answers by endpoint, method and status, whatever layer gave them. Knows ASGI scopes; knows no endpoint.

Labels have few values, whatever clients send: what reaches no endpoint counts as `other`, and so does a strange method.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import Scope

NAME = "http_requests"
HELP = "Answers by endpoint, method and status; 499 is a client that left first."
LABELS = ("handler", "method", "status")
METHODS = ("GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE")
OTHER = "other"


class HttpCounts:
    """Counts on the event loop, before there is a model as well as after."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str, str]] = Counter()

    def note(self, scope: Scope, status: int) -> None:
        """A request has been answered, or its client has left."""
        handler = getattr(scope.get("route"), "path_format", OTHER)
        method = scope["method"] if scope["method"] in METHODS else OTHER
        self._counts[handler, method, str(status)] += 1

    def items(self) -> list[tuple[tuple[str, str, str], int]]:
        """(handler, method, status) and their count."""
        return list(self._counts.items())


class HttpCollector(Collector):
    """Asked by the registry at each scrape."""

    def __init__(self, prefix: str, labels: Mapping[str, str]) -> None:
        """`labels`: those of every metric."""
        self.counts = HttpCounts()
        """What the layers in front of the application count; /metrics brings it along."""
        self._prefix = prefix
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._prefix + NAME, HELP, labels=[*self._labels, *LABELS])
        for own, count in self.counts.items():
            family.add_metric([*self._labels.values(), *own], count)
        yield family
