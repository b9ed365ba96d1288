"""Exchange: messages between ranks and their booking. A message says how long it is, so no sizes are exchanged first.

What a rank has for itself never travels. Bytes are counted where our code hands them over: messages with their lengths,
without the transport's own headers. Knows wires and bytes; knows no tokens.

Shape alphabet: W bytes in a row, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt
import torch

from moe_serve.parallel.wire.sockets import LENGTH, Wire

KINDS = ("dispatch", "combine", "control")
"""Tokens to experts; results to tokens; lengths and checks."""


class Traffic:
    """What this rank has sent to others, by layer and kind. Monotone; readers take differences."""

    def __init__(self, num_layers: int) -> None:
        self.sent_bytes: dict[str, npt.NDArray[np.int64]] = {kind: np.zeros(num_layers, np.int64) for kind in KINDS}
        self.unmerged_bytes = np.zeros(num_layers, np.int64)
        """Bytes of dispatch and combine if each choice on another rank sent a row of its own there and back, as in
        GShard and DeepSpeed-MoE."""
        self.trips = np.zeros(num_layers, np.int64)
        """How often this rank waited for messages that were sent when its own were: a link's delay each."""
        self.local_rows = 0
        """(token, choice) pairs that ran on the rank where the token was."""
        self.remote_rows = 0

    def totals(self) -> dict[str, int]:
        """Sums over layers, by name."""
        return {
            **{f"{kind}_bytes": int(counts.sum()) for kind, counts in self.sent_bytes.items()},
            "unmerged_bytes": int(self.unmerged_bytes.sum()),
            "trips": int(self.trips.sum()),
            "local_rows": self.local_rows,
            "remote_rows": self.remote_rows,
        }

    def by_layer(self) -> list[int]:
        """Bytes sent per MoE layer, all kinds."""
        layers: list[int] = sum(self.sent_bytes.values(), np.zeros_like(self.trips)).tolist()
        return layers


class Exchange:
    """One rank's side of all exchanges; every rank must make the same ones in the same order."""

    def __init__(self, rank: int, num_ranks: int, num_layers: int, wire: Wire, first_rank: int = 0) -> None:
        """Rank `rank` of a group of `num_ranks`, which `wire` knows by numbers from `first_rank` on."""
        self.rank = rank
        self.num_ranks = num_ranks
        self.traffic = Traffic(num_layers)
        self.wire = wire
        self._first_rank = first_rank
        self.others = tuple(r for r in range(num_ranks) if r != rank)

    def trade(
        self, layer: int, outgoing: Mapping[int, torch.Tensor], incoming: Collection[int]
    ) -> dict[int, torch.Tensor]:
        """As Wire.trade; books lengths and the wait, not the contents (`book`).

        `layer`: index of the MoE layer.
        """
        self.book(layer, "control", len(outgoing) * LENGTH.size)
        self.traffic.trips[layer] += bool(incoming)
        first = self._first_rank
        raws = self.wire.trade({first + r: raw for r, raw in outgoing.items()}, [first + r for r in incoming])
        return {rank - first: raw for rank, raw in raws.items()}

    def book(self, layer: int, kind: str, num_bytes: int) -> None:
        """Count payload on its way to other ranks."""
        self.traffic.sent_bytes[kind][layer] += num_bytes


def pack(*columns: torch.Tensor) -> torch.Tensor:
    """Columns [n] or [n, width] of any dtype side by side as rows of bytes [n, W]."""
    wide = [column if column.ndim > 1 else column[:, None] for column in columns]
    return torch.cat([column.contiguous().view(torch.uint8) for column in wide], dim=1)


def unpack(raw: torch.Tensor, *kinds: tuple[int, torch.dtype]) -> list[torch.Tensor]:
    """The columns of packed rows [n * W]: for each (width, dtype) a tensor [n, width]."""
    rows = raw.view(-1, sum(width * dtype.itemsize for width, dtype in kinds))
    columns, start = [], 0
    for width, dtype in kinds:
        end = start + width * dtype.itemsize
        columns.append(rows[:, start:end].flatten().clone().view(dtype).view(len(rows), width))  # clone: aligned
        start = end
    return columns
