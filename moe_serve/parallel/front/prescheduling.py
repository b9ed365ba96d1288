"""Prescheduling: on which rank a new sequence lives, so that fewer of its tokens have to travel.

Speculative MoE (arXiv 2503.04398) guesses a token's experts from its id before it is computed; a guess only
chooses a place, so a wrong one costs bytes and changes no token. Knows token ids and the placement; knows
no model.

Shape alphabet: U token ids that were seen, L MoE layers, E experts, G ranks.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np
import numpy.typing as npt

from moe_serve.parallel.front.token_uses import TokenUses
from placement.cost import Hosts

BALANCE_TOKENS = 512
"""A rank this many tokens ahead of another is not given a sequence that it suits better."""


class Prescheduler:
    """Without a predictor: a sequence goes where the fewest tokens are."""

    def __init__(self, hosts: Hosts, uses: TokenUses | None = None) -> None:
        """hosts [L, E, G]: of one group of ranks."""
        self._uses = uses
        self._affinity: TokenAffinity | None = None
        self.place(hosts)

    def place(self, hosts: Hosts) -> None:
        """The experts live elsewhere from now on."""
        if self._uses is not None:
            self._affinity = TokenAffinity(self._uses, hosts)

    def home(self, prompt: Items[int], tokens_at: Items[int]) -> int:
        """The rank for a new sequence. `tokens_at`: tokens that each rank has already."""
        if self._affinity is None:
            return int(np.argmin(tokens_at))
        lightest = min(tokens_at)
        fit = np.array([tokens <= lightest + BALANCE_TOKENS for tokens in tokens_at])
        expected = np.resize(self._affinity.of_sequence(prompt), len(tokens_at))  # every group alike
        best = np.lexsort((np.array(tokens_at), -np.where(fit, expected, -1.0)))
        return int(best[0])


class TokenAffinity:
    """Where the experts live that a token id is expected to use."""

    def __init__(self, uses: TokenUses, hosts: Hosts) -> None:
        """hosts [L, E, G]."""
        num_layers, _, num_ranks = hosts.shape
        self._token_ids = uses.token_ids
        self._expected = np.zeros((len(uses.token_ids) + 1, num_ranks))
        """[U + 1, G]; the last row stands for token ids that were never seen."""
        for layer in range(num_layers):
            counts = uses.counts[:, layer]
            totals = np.maximum(counts.sum(1, keepdims=True), 1)
            self._expected[:-1] += counts / totals @ hosts[layer] / num_layers

    def of_sequence(self, tokens: Items[int]) -> npt.NDArray[np.float64]:
        """[G] the expected share of the tokens' experts on each rank."""
        wanted = np.asarray(tokens)
        rows = np.searchsorted(self._token_ids, wanted)
        rows[~np.isin(wanted, self._token_ids)] = len(self._token_ids)
        mean: npt.NDArray[np.float64] = self._expected[rows].mean(0)
        return mean
