"""MissChoice: how a layer's missing experts are served in this step: brought into slots, or computed on the host.

On a CPU an expert can be computed straight from the mapped file, which pays exactly while the page cache holds it: no
byte moves. Below a GPU it can be computed on the CPU, which pays for few tokens. Steps that stream (streaming.py) are
not asked about: their reads go on while they compute, and the CPU is what they are short of.
Knows no slots and no arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from expert_cache.host_compute.crossover import MissCosts, cheapest_on_host
from expert_cache.host_compute.host_copies import HostCopies
from predictors.shape import MoELayer


class MissChoice(Protocol):
    """Asked once per layer and step in which something is missing."""

    def on_host(self, layer: MoELayer, missing: Sequence[int], counts: Sequence[int], num_coming: int) -> list[int]:
        """Of the missing experts, those to compute on the host. `counts`: tokens of each; `num_coming`: experts of the
        layer that are on their way already."""
        ...

    def stays(self, layer: MoELayer, expert: int) -> bool:
        """Every use of the expert is computed on the host, so a prefetch would be of no use."""
        ...


class FromPageCache:
    """For a CPU: experts that the page cache holds at the moment, computed from the mapped file."""

    def __init__(self, copies: HostCopies) -> None:
        self._copies = copies

    def on_host(self, layer: MoELayer, missing: Sequence[int], counts: Sequence[int], num_coming: int) -> list[int]:
        """See MissChoice."""
        return [expert for expert in missing if self._copies.is_in_memory(layer, expert)]

    def stays(self, layer: MoELayer, expert: int) -> bool:
        """See MissChoice."""
        return self._copies.is_in_memory(layer, expert)


class ByCrossover:
    """For a device: those of few tokens, so that the link and the CPU are done at the same time."""

    def __init__(self, costs: MissCosts) -> None:
        self.costs = costs

    def on_host(self, layer: MoELayer, missing: Sequence[int], counts: Sequence[int], num_coming: int) -> list[int]:
        """See MissChoice."""
        return [missing[i] for i in cheapest_on_host(counts, self.costs, num_coming)]

    def stays(self, layer: MoELayer, expert: int) -> bool:
        """False: the number of tokens, which decides, is unknown before the router asks."""
        return False
