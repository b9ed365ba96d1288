"""Which copy of an expert a token goes to, where several ranks hold one. Arrays in, arrays out; knows no ranks' state.

Shape alphabet: T tokens, K choices, G ranks.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


def choose_copies(held: Bools, load: npt.NDArray[np.float64], here: Ints | None) -> Ints:
    """held [T, K, G] who holds a token's experts -> ranks [T, K]: that of `here` [T] if it can, else one where the
    token goes anyway, else where most of it can go, else the one with the least `load` [G]."""
    top_k, num_ranks = held.shape[1:]
    rest, score = held, 1.0 / (1.0 + load)
    if here is not None:
        is_here = (here[:, None] == np.arange(num_ranks))[:, None]
        rest = held & ~(held & is_here).any(2, keepdims=True)
        score = score + 4.0 * (top_k + 1) * is_here
    must = (held & (held.sum(2, keepdims=True) == 1)).any(1, keepdims=True)
    score = score + 2.0 * (top_k + 1) * must + rest.sum(1, keepdims=True)
    ranks: Ints = np.where(held, score, -1.0).argmax(2)
    return ranks


def visits(ranks: Ints, num_ranks: int) -> Bools:
    """[T, G] whether any of a token's choices `ranks` [T, K] runs on a rank."""
    found: Bools = (ranks[:, :, None] == np.arange(num_ranks)).any(1)
    return found
