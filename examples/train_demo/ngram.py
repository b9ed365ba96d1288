"""Interpolated n-gram models of integer symbols: the baselines the demo model must beat."""

import numpy as np
from numpy.typing import NDArray

Symbols = NDArray[np.int64]
Probabilities = NDArray[np.float64]


class _Table:
    """Counts of integer keys, looked up by binary search."""

    def __init__(self, keys: Symbols) -> None:
        self._keys, self._counts = np.unique(keys, return_counts=True)

    def distinct(self) -> Symbols:
        """The keys that occur, sorted."""
        return self._keys

    def count(self, keys: Symbols) -> Probabilities:
        """How often each of ``keys`` [n] occurred in training: [n]."""
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[at] == keys, self._counts[at], 0).astype(np.float64)


class InterpolatedNgram:
    """An n-gram model with Witten-Bell interpolation down to a uniform distribution.

    A context seen c times with t different successors gives its own estimate the weight
    c / (c + t) and passes the rest to the next shorter context.
    """

    def __init__(self, stream: Symbols, order: int, size: int) -> None:
        """Count n-grams up to ``order`` in ``stream`` [n] of symbols below ``size``."""
        self._order = order
        self._size = size
        self._grams = [_Table(self._keys(stream, n)) for n in range(1, order + 1)]
        self._contexts = [_Table(self._keys(stream[:-1], n)) for n in range(1, order)]
        self._successors = [_Table(gram.distinct() // size) for gram in self._grams[1:]]
        self._total = float(len(stream))
        self._types = float(len(self._grams[0].distinct()))

    def _keys(self, stream: Symbols, order: int) -> Symbols:
        """One integer for each run of ``order`` symbols: [n - order + 1]."""
        count = len(stream) - order + 1
        key = np.zeros(count, dtype=np.int64)
        for offset in range(order):
            key = key * self._size + stream[offset : offset + count]
        return key

    def probabilities(self, stream: Symbols) -> Probabilities:
        """Probability of each symbol of ``stream`` [n] after those before it: [n]."""
        seen = self._grams[0].count(stream)
        result = (seen + self._types / self._size) / (self._total + self._types)
        for order in range(2, self._order + 1):
            keys = self._keys(stream, order)
            context = keys // self._size
            types = self._successors[order - 2].count(context)
            count = self._contexts[order - 2].count(context)
            shorter = result[order - 1 :]
            mixed = self._grams[order - 1].count(keys) + types * shorter
            result[order - 1 :] = np.where(count > 0, mixed / np.maximum(count + types, 1), shorter)
        return result

    def bits(self, stream: Symbols) -> float:
        """Code length of ``stream`` in bits."""
        return float(-np.log2(self.probabilities(stream)).sum())
