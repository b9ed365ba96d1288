"""Prescheduling: on which rank a new sequence lives, so that fewer of its tokens have to travel.

Speculative MoE (arXiv 2503.04398) guesses a token's experts from its id before it is computed; a guess only
chooses a place, so a wrong one costs bytes and changes no token. Knows token ids and the placement; knows
no model.

Shape alphabet: V vocabulary, L MoE layers, E experts, G ranks.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_serve.errors import ConfigError
from moe_serve.parallel.expert_plans import Hosts
from moe_serve_base.whole_files import whole_file

BALANCE_TOKENS = 512
"""A rank this many tokens ahead of another is not given a sequence that it suits better."""

Counts = npt.NDArray[np.int64]


class Prescheduler:
    """Without a table: a sequence goes where the fewest tokens are."""

    def __init__(self, hosts: Hosts, read_uses: Callable[[], Counts] | None = None) -> None:
        """hosts [L, E, G]: of one group of ranks. `read_uses`: the table [V, L, E], read again for each placement,
        since it may be large and placements are rare; None: there is none."""
        self._read_uses = read_uses
        self._affinity: TokenAffinity | None = None
        self.place(hosts)

    def place(self, hosts: Hosts) -> None:
        """The experts live elsewhere from now on."""
        if self._read_uses is not None:
            self._affinity = TokenAffinity(self._read_uses(), hosts)

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

    def __init__(self, uses: Counts, hosts: Hosts) -> None:
        """uses [V, L, E]: how often a token id used an expert; hosts [L, E, G]."""
        num_layers, _, num_ranks = hosts.shape
        self._expected = np.zeros((len(uses), num_ranks))
        for layer in range(num_layers):  # one at a time: the whole table as float64 may not fit
            totals = np.maximum(uses[:, layer].sum(1, keepdims=True), 1)
            self._expected += uses[:, layer] / totals @ hosts[layer] / num_layers

    def of_sequence(self, tokens: Items[int]) -> npt.NDArray[np.float64]:
        """[G] the expected share of the tokens' experts on each rank."""
        mean: npt.NDArray[np.float64] = self._expected[list(tokens)].mean(0)
        return mean


def count_uses(tokens: Counts, ids: Counts, vocab_size: int, num_experts: int) -> Counts:
    """tokens [N] and the experts ids [N, L, K] they went to -> how often each token id used each expert, [V, L, E]."""
    counts = np.zeros((vocab_size, ids.shape[1], num_experts), np.int64)
    for layer in range(ids.shape[1]):
        np.add.at(counts[:, layer], (np.broadcast_to(tokens[:, None], ids[:, layer].shape), ids[:, layer]), 1)
    return counts


def save_uses(path: Path, counts: Counts) -> None:
    """As --ep-predictor reads it."""
    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, token_experts=counts.astype(np.uint32), allow_pickle=False)


def load_uses(path: str, vocab_size: int, num_layers: int, num_experts: int) -> Counts:
    """ConfigError names the field that does not fit the model."""
    try:
        with np.load(path, allow_pickle=False) as data:
            counts: npt.NDArray[Any] = data["token_experts"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(f"--ep-predictor {path}: token_experts cannot be read ({error})") from error
    wanted = (vocab_size, num_layers, num_experts)
    if counts.shape != wanted or counts.dtype.kind not in "iu":
        raise ConfigError(
            f"--ep-predictor {path}: token_experts is {counts.dtype} {counts.shape}; this model needs integers {wanted}"
        )
    return counts.astype(np.int64)
