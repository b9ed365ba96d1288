"""Traffic: what this rank has sent to others, by layer and kind. Monotone; readers take differences.

Counted where our code hands the bytes over: messages with their lengths, without the transport's own headers.

Shape alphabet: L MoE layers by dense index.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

KINDS = ("dispatch", "combine", "control")
"""Tokens to experts; results to tokens; lengths and checks."""


class Traffic:
    """One rank's counts."""

    def __init__(self, num_layers: int) -> None:
        self.sent_bytes: dict[str, npt.NDArray[np.int64]] = {kind: np.zeros(num_layers, np.int64) for kind in KINDS}
        self.unmerged_bytes = np.zeros(num_layers, np.int64)
        """What dispatch and combine would be with a row of hidden states out and one back for each of a token's
        choices on another rank than its home's, as in GShard and DeepSpeed-MoE."""
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
