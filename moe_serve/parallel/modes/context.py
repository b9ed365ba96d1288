"""Keys and values on their way to all ranks: they ride in messages that are sent anyway, so they cost no wait.

A layer's are known before its experts are chosen, and needed elsewhere only in a later step: those since the layer
with experts before travel with its tokens. Knows KV layers and rows; knows no sockets.

Shape alphabet: T tokens of the step, n of them in a layer here, W bytes in a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from moe_serve.execution.kv_cache import KVCache, LayerKV
from moe_serve.parallel.wire.exchange import pack, unpack


class ContextShare:
    """One rank's side, for one step after the other."""

    def __init__(self, kv_cache: KVCache, moe_layers: Iterable[int]) -> None:
        self._layers = kv_cache.layers
        self._moe_layers = tuple(moe_layers)
        self._slots = torch.empty(0, dtype=torch.int64)
        self._visited: Mapping[int, torch.Tensor] = {}

    def begin(self, slots: torch.Tensor, visited: Mapping[int, torch.Tensor]) -> None:
        """A step. `slots` [T]: where rows are cached; `visited`, which fills meanwhile: rows [n] of a layer here."""
        self._slots = slots
        self._visited = visited

    def due(self, layer: int | None) -> list[int]:
        """Decoder layers whose keys and values go with those of MoE layer `layer`; None: those after the last."""
        end = max(self._layers) if layer is None else layer
        before = [each for each in self._moe_layers if layer is None or each < layer]
        return [each for each in self._layers if max(before, default=-1) < each <= end]

    def counts(self, layers: Iterable[int]) -> list[int]:
        """How many rows of each layer `packed` has."""
        return [len(self._visited[layer]) for layer in layers]

    def packed(self, layers: Iterable[int]) -> torch.Tensor:
        """Row numbers, keys and values, uint8 [n * W] of each layer one after the other."""
        parts = [_read(self._layers[layer], self._visited[layer], self._slots) for layer in layers]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)

    def take(self, layers: Iterable[int], counts: Iterable[int], raw: torch.Tensor) -> None:
        """Cache what another rank's `packed` holds."""
        start = 0
        for layer, count in zip(layers, counts, strict=True):
            end = start + count * _row_bytes(self._layers[layer])
            if count:
                _write(self._layers[layer], raw[start:end], self._slots)
            start = end


def _row_bytes(layer: LayerKV) -> int:
    return 4 + layer.shape.elements_per_token * layer.keys.element_size()


def _read(layer: LayerKV, rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    parts = (data[:, slots[rows]].transpose(0, 1).flatten(1) for data in layer.stored)
    return pack(rows.int(), *parts).flatten()


def _write(layer: LayerKV, raw: torch.Tensor, slots: torch.Tensor) -> None:
    widths = ((data.shape[0] * data.shape[2], data.dtype) for data in layer.stored)
    rows, *parts = unpack(raw, (1, torch.int32), *widths)
    for data, part in zip(layer.stored, parts, strict=True):
        by_head = part.view(len(rows), len(data), -1).transpose(0, 1)
        data.index_copy_(1, slots[rows[:, 0].long()], by_head)
