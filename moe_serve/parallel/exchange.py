"""Exchange: rows of bytes between ranks. Counts first, so that what nobody needs is never sent; then one all-to-all.

What a rank has for itself never enters a collective. Knows torch.distributed and bytes; knows no tokens.

Shape alphabet: G ranks, W bytes in a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from moe_serve.parallel.traffic import Traffic


class Exchange:
    """The collectives of one rank; every rank must call the same ones in the same order."""

    def __init__(self, rank: int, num_ranks: int, traffic: Traffic, device: torch.device) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self.traffic = traffic
        self.device = device

    def counts(self, layer: int, mine: Sequence[int]) -> list[list[int]]:
        """Every rank's numbers, by rank: all give equally many. `layer`: where the traffic is booked."""
        sent = torch.tensor(mine, dtype=torch.int32, device=self.device)
        received = [torch.empty_like(sent) for _ in range(self.num_ranks)]
        dist.all_gather(received, sent)
        self._book(layer, "control", sent.nbytes * (self.num_ranks - 1))
        numbers: list[list[int]] = torch.stack(received).tolist()
        return numbers

    def swap(
        self, layer: int, kind: str, parts: Sequence[torch.Tensor], num_incoming: Sequence[int]
    ) -> list[torch.Tensor]:
        """parts[r] [n_r, W] uint8 goes to rank r; returns what came, [num_incoming[r], W] from rank r.

        The own part must be empty: it does not travel.
        """
        assert not len(parts[self.rank])
        width = parts[0].shape[1]
        sent = torch.cat(list(parts))
        received = torch.empty(sum(num_incoming), width, dtype=torch.uint8, device=self.device)
        dist.all_to_all_single(received, sent, list(num_incoming), [len(part) for part in parts])
        self._book(layer, kind, sent.nbytes)
        return list(torch.split(received, list(num_incoming)))

    def _book(self, layer: int, kind: str, num_bytes: int) -> None:
        self.traffic.sent_bytes[kind][layer] += num_bytes
        self.traffic.collectives[layer] += 1


def pack(*columns: torch.Tensor) -> torch.Tensor:
    """Columns [n] or [n, width] of any dtype side by side as rows of bytes [n, W]."""
    wide = [column if column.ndim > 1 else column[:, None] for column in columns]
    return torch.cat([column.contiguous().view(torch.uint8) for column in wide], dim=1)


def unpack(rows: torch.Tensor, *kinds: tuple[int, torch.dtype]) -> list[torch.Tensor]:
    """The columns of packed rows [n, W]: for each (width, dtype) a tensor [n, width]."""
    columns, start = [], 0
    for width, dtype in kinds:
        end = start + width * dtype.itemsize
        columns.append(rows[:, start:end].flatten().clone().view(dtype).view(len(rows), width))  # clone: aligned
        start = end
    return columns
