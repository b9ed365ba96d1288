"""Streaming: what to do in a step that needs nearly all experts, as a long prompt or a wide batch does.

The next layer then needs nearly all of its experts too, so no prediction is needed. They are read ahead in file order
through the transit slots while this layer computes (SE-MoE's ring memory). The experts in the pools stay where they
are. A layer's own need decides for the next layer, anew in each step. A wrong choice costs at most the transit slots.
Knows experts and where they lie; knows no slots and no tokens.

Shape alphabet: L MoE layers, E experts per layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from expert_cache.storage import ExpertStore
from predictors.shape import Key, MoELayer

NEARLY_ALL_FRAC = 0.875
"""Of a layer's experts: reading the rest for nothing is then cheaper than an idle disk."""
FEWEST_RING_SLOTS = 2
"""One is read into while the other computes; with fewer, slots of the pools have to help."""


class Streaming:
    """The order of a store's experts on their way through a ring of slots."""

    def __init__(self, store: ExpertStore) -> None:
        self._num_experts = store.num_experts
        self._store = store
        self._order: dict[MoELayer, list[int]] = {}

    def suits(self, num_wanted: int) -> bool:
        """Whether a step that wants `num_wanted` experts of a layer will want nearly all of the next layer's."""
        return num_wanted >= NEARLY_ALL_FRAC * self._num_experts

    def in_file_order(self, layer: MoELayer, experts: Iterable[int]) -> list[int]:
        """These experts of a layer as one reads the file from front to back."""
        wanted = set(experts)
        return [expert for expert in self._file_order(layer) if expert in wanted]

    def ahead(self, layer: MoELayer) -> Iterator[Key]:
        """Every expert of the layers after this one, nearest first."""
        for later in self._store.layers[layer + 1 :]:
            for expert in self._file_order(later):
                yield later, expert

    def _file_order(self, layer: MoELayer) -> list[int]:
        if layer not in self._order:
            reads = self._store.reads
            place = {e: (reads(layer, e)[0].file, reads(layer, e)[0].offset) for e in range(self._num_experts)}
            self._order[layer] = sorted(place, key=place.__getitem__)
        return self._order[layer]
