"""Prescheduling: on which rank sequences live and tokens begin, so that fewer of them have to travel.

Speculative MoE (arXiv 2503.04398) guesses a token's experts from its id before it is computed; a guess only
chooses a place, so a wrong one costs bytes and changes no token. Knows token ids and the placement; knows
no model.

Shape alphabet: V vocabulary, L MoE layers, E experts, G ranks.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_serve.errors import ConfigError
from moe_serve.parallel.expert_plans import Hosts
from moe_serve.scheduling.sequence import Sequence

BALANCE_TOKENS = 512
"""A rank this many tokens ahead of another is not given a sequence that it suits better."""

Counts = npt.NDArray[np.int64]


class Prescheduler:
    """Without a predictor: sequences go where the fewest tokens are, and tokens begin at home."""

    def __init__(
        self,
        num_ranks: int,
        affinity: TokenAffinity | None = None,
        follow: Callable[[Hosts], TokenAffinity] | None = None,
    ) -> None:
        """`num_ranks`: of a group, among which the affinity's experts are divided. `follow`: the affinity under another
        placement; None where there is no predictor."""
        self._num_ranks = num_ranks
        self._affinity = affinity
        self._follow = follow

    def place(self, hosts: Hosts) -> None:
        """The experts live elsewhere from now on."""
        if self._follow is not None:
            self._affinity = self._follow(hosts)

    def home(self, prompt: Items[int], tokens_at: Items[int]) -> int:
        """The rank for a new sequence. `tokens_at`: tokens that each rank has already."""
        lightest = min(tokens_at)
        fit = np.array([tokens <= lightest + BALANCE_TOKENS for tokens in tokens_at])
        if self._affinity is None:
            return int(np.argmin(tokens_at))
        expected = np.resize(self._affinity.of_sequence(prompt), len(tokens_at))  # every group alike
        best = np.lexsort((np.array(tokens_at), -np.where(fit, expected, -1.0)))
        return int(best[0])

    def starts(self, decoding: Iterable[Sequence]) -> dict[Sequence, int]:
        """For each sequence about to decode, the rank where its newest token should begin: one of its home's group."""
        if self._affinity is None:
            return {}
        size, first_rank = self._num_ranks, self._affinity.first_rank
        return {seq: seq.home_rank // size * size + first_rank(seq.token_ids[-1]) for seq in decoding}


class TokenAffinity:
    """Where the experts live that a token id is expected to use."""

    def __init__(self, counts: Counts, hosts: Hosts) -> None:
        """counts [V, L, E]: how often a token id used an expert; hosts [L, E, G]."""
        first = (counts[:, 0, :, None] * hosts[None, 0]).sum(1)
        self._first_rank = np.where(first.any(1), first.argmax(1), np.arange(len(first)) % hosts.shape[2])
        uses = np.maximum(counts.sum(2, keepdims=True), 1)
        self._expected = np.einsum("vle,leg->vg", counts / uses, hosts.astype(np.float64)) / counts.shape[1]

    def of_sequence(self, tokens: Items[int]) -> npt.NDArray[np.float64]:
        """[G] the expected share of the tokens' experts on each rank."""
        mean: npt.NDArray[np.float64] = self._expected[list(tokens)].mean(0)
        return mean

    def first_rank(self, token: int) -> int:
        """The rank that holds most of what a token uses in the first MoE layer."""
        return int(self._first_rank[token])


def count_uses(tokens: Counts, ids: Counts, vocab_size: int, num_experts: int) -> Counts:
    """tokens [N] and the experts ids [N, L, K] they went to -> how often each token id used each expert, [V, L, E]."""
    counts = np.zeros((vocab_size, ids.shape[1], num_experts), np.int64)
    for layer in range(ids.shape[1]):
        np.add.at(counts[:, layer], (np.broadcast_to(tokens[:, None], ids[:, layer].shape), ids[:, layer]), 1)
    return counts


def save_uses(path: Path, counts: Counts) -> None:
    """As --ep-predictor reads it."""
    np.savez_compressed(path, token_experts=counts.astype(np.uint32), allow_pickle=False)


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
