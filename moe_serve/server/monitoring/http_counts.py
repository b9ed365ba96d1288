"""HttpCounts: answers by endpoint, method and status, whatever layer gave them. Knows ASGI scopes; knows no endpoint.

Labels have few values, whatever clients send: a path that no endpoint has counts as `other`, and so does a method.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping

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
        self._handlers: frozenset[str] = frozenset()
        self._counts: Counter[tuple[str, str, str]] = Counter()

    def know(self, handlers: Collection[str]) -> None:
        """The paths that endpoints have, as they are registered: `/v1/models/{name}`."""
        self._handlers = frozenset(handlers)

    def note(self, scope: Scope, status: int) -> None:
        """A request has been answered, or its client has left."""
        path = scope["path"]
        if path not in self._handlers:
            path = getattr(scope.get("route"), "path_format", OTHER)
        method = scope["method"] if scope["method"] in METHODS else OTHER
        self._counts[path if path in self._handlers else OTHER, method, str(status)] += 1

    def collector(self, prefix: str, labels: Mapping[str, str]) -> Collector:
        """For a registry; `labels` are those of every metric."""
        return _HttpCollector(self._counts, prefix, labels)


class _HttpCollector(Collector):
    def __init__(self, counts: Counter[tuple[str, str, str]], prefix: str, labels: Mapping[str, str]) -> None:
        self._counts = counts
        self._prefix = prefix
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._prefix + NAME, HELP, labels=[*self._labels, *LABELS])
        for own, count in list(self._counts.items()):
            family.add_metric([*self._labels.values(), *own], count)
        yield family
