"""FairShares: what each client has been served, in tokens, so that the one served least goes first.

The counters of VTC (Sheng et al., Fairness in Serving Large Language Models, OSDI 2024): a computed token counts one,
of a prompt or of an answer; a cached one is free. A client that comes anew starts with the least of those present:
what it did not ask for in its absence it cannot save up. Knows names and numbers; knows no queue.
"""

from __future__ import annotations

from collections import Counter

MOST_ABSENT = 4096
"""Clients without a sequence whose counters are kept, so that leaving for a moment clears no debt."""


class FairShares:
    """Served tokens by client."""

    def __init__(self) -> None:
        self._served: dict[str, int] = {}
        self._present: Counter[str] = Counter()

    @property
    def are_shared(self) -> bool:
        """More than one client has sequences: there is something to divide."""
        return len(self._present) > 1

    def served(self, client: str) -> int:
        """Tokens; a later client's counter starts with those of others."""
        return self._served[client]

    def enter(self, client: str) -> None:
        """A sequence of this client is there now."""
        if client not in self._present:
            least = min((self._served[other] for other in self._present), default=0)
            self._served[client] = max(self._served.pop(client, 0), least)
        self._present[client] += 1

    def leave(self, client: str) -> None:
        """A sequence of this client has ended."""
        self._present[client] -= 1
        if self._present[client]:
            return
        del self._present[client]
        if len(self._served) > len(self._present) + MOST_ABSENT:
            del self._served[next(name for name in self._served if name not in self._present)]

    def charge(self, client: str, tokens: int) -> None:
        """The client was served these."""
        self._served[client] += tokens
