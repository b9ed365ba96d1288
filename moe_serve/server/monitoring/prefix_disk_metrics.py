"""What the prefix cache on disk has done, for /metrics. Knows its totals; knows no files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from moe_serve.scheduling.stats import DiskTotals

COUNTERS = {
    "prefix_disk_hits": ("hit_tokens", "Prompt tokens found in the prefix cache on disk."),
    "prefix_disk_read_bytes": ("read_bytes", "Bytes of cached prefixes read from disk."),
    "prefix_disk_written_bytes": ("written_bytes", "Bytes of cached prefixes written to disk."),
    "prefix_disk_refused_files": ("refused_files", "Files of the prefix cache that were damaged or foreign."),
}
GAUGES = {"prefix_disk_bytes": ("num_bytes", "Bytes of cached prefixes on disk.")}


class PrefixDiskCollector(Collector):
    """Asked by the registry at each scrape. Zeros without a cache on disk."""

    def __init__(self, prefix: str, labels: Mapping[str, str]) -> None:
        """`labels`: those of every metric."""
        self.totals = DiskTotals()
        """Live ones, once the engine has told its load."""
        self._prefix = prefix
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        labels, values = list(self._labels), list(self._labels.values())
        for name, (field, help) in COUNTERS.items():
            counter = CounterMetricFamily(self._prefix + name, help, labels=labels)
            counter.add_metric(values, getattr(self.totals, field))
            yield counter
        for name, (field, help) in GAUGES.items():
            gauge = GaugeMetricFamily(self._prefix + name, help, labels=labels)
            gauge.add_metric(values, getattr(self.totals, field))
            yield gauge
