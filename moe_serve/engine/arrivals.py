"""Arrivals: sequences whose cached prefixes are on their way from the disk. The scheduler gets them afterwards.

Knows loads and sequences; knows no queue and no files.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence as Several
from dataclasses import dataclass, field

from moe_serve.prefix_disk.tier import DiskTier, Load
from moe_serve.scheduling.sequence import Sequence

WAIT_S = 0.02
"""A step without anything else to do waits for a load for this long."""


@dataclass(slots=True)
class Arrivals:
    """All methods belong to the engine's thread."""

    tier: DiskTier
    _loads: list[tuple[Load, Several[Sequence]]] = field(default_factory=list)
    _landed: threading.Event = field(default_factory=threading.Event)

    def begin(self, sequences: Several[Sequence], num_running: int) -> bool:
        """Start to load the prefix that the sequences of a request share; False if there is nothing to load."""
        load = self.tier.begin_load(sequences[0], num_running, self._landed.set)
        if load is None:
            return False
        self._loads.append((load, sequences))
        return True

    def landed(self, is_idle: bool) -> list[Sequence]:
        """The sequences whose prefixes are there now, in order. `is_idle`: wait WAIT_S for one."""
        if is_idle and self._loads and not self._loads[0][0].done.done():
            self._landed.wait(WAIT_S)
        self._landed.clear()
        found: list[Sequence] = []
        while self._loads and self._loads[0][0].done.done():
            load, sequences = self._loads.pop(0)
            self.tier.land(load)
            found += [seq for seq in sequences if not seq.is_finished]
        return found

    def live(self) -> list[Sequence]:
        """Unfinished sequences that wait."""
        return [seq for _, sequences in self._loads for seq in sequences if not seq.is_finished]

    def held_pages(self) -> list[list[int]]:
        """The pages of each load."""
        return [[*load.held, *load.pages] for load, _ in self._loads]

    def held_rows(self) -> list[int]:
        """The rows of states that are being loaded."""
        return [load.state[1] for load, _ in self._loads if load.state is not None]
