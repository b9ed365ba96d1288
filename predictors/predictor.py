"""What a predictor is: it watches the routes of running sequences and says which experts come next.

Batched over rows. A stream is one running sequence, named by a small integer that the caller may use again after
`begin`. A stream's token is begun by `step`, then its layers are observed in ascending order (some may be left out);
at any time in between, `probabilities` may be asked for any layer not yet observed. How far a forecast reaches is its
lookahead d: that layer minus the newest one observed; before the first layer of a token, that layer plus one.

Predictors do not learn while they serve: what they know of a model comes from `fit`, what they know of a stream from
that stream alone.

Laws. tests/predictors/test_methods.py checks them on every method that is installed, and names the law that fails.

1. Probabilities are finite and within 0..1.
2. Each row of `probabilities` sums to K: at least 0.85 K, and never more.
3. A forecast depends on past routes only, unless `needs` holds FUTURE.
4. A stream that is begun again has forgotten what it was.
5. A row depends neither on the other rows of a call, nor on its stream's number, nor on earlier requests.
6. `arrays` holds everything that was learnt: `from_arrays` gives the same forecasts within 0.02 (files hold half
   precision).
7. The same training gives the same arrays: draw from `Training.seed` only.
8. `needs` names known things: TOKEN_IDS, HIDDEN, FUTURE.

Knows numpy only; neither slots nor models. Hidden states pass through untouched, in the caller's type.

Shape alphabet: T rows, L MoE layers, E experts per layer, K experts per token, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt

from predictors.trace import RoutingTrace

Ints = npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.floating[Any]]
Probabilities = npt.NDArray[np.float32]

TOKEN_IDS = "token ids"
HIDDEN = "hidden states"
FUTURE = "the future"


@dataclass(frozen=True)
class RouterShape:
    """What routes look like in one model."""

    layer_ids: tuple[int, ...]
    """Each MoE layer's index in the checkpoint."""
    num_experts: int
    top_k: int

    @property
    def num_layers(self) -> int:
        return len(self.layer_ids)

    def sizes(self) -> tuple[int, int, int]:
        """(layers, experts, choices): what a predictor's arrays depend on."""
        return self.num_layers, self.num_experts, self.top_k


@dataclass(frozen=True, eq=False)
class Training:
    """What a method may learn from."""

    trace: RoutingTrace
    """With `token_ids` where a method needs them."""
    routers: Sequence[tuple[Any, Any]] = ()
    """(weight [E, H], bias [E] or None) of each layer's gate, for methods that need hidden states."""
    seed: int = 0

    @property
    def shape(self) -> RouterShape:
        return RouterShape(tuple(self.trace.layer_ids.tolist()), self.trace.num_experts, self.trace.top_k)


class Predictor(Protocol):
    """What a method's file exports as `METHOD`: its class."""

    needs: ClassVar[frozenset[str]]
    """What it must be told besides routes: TOKEN_IDS in `step`, HIDDEN in `observe`, FUTURE (bounds, not methods)."""

    @classmethod
    def fit(cls, training: Training) -> Self:
        """Learn from recorded routes. ValueError names what the training lacks."""
        ...

    @classmethod
    def from_arrays(cls, shape: RouterShape, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        """What `arrays` gave. KeyError or ValueError where they are not those of this method and shape."""
        ...

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Everything that was learnt, to be kept in a file."""
        ...

    def begin(self, streams: Ints) -> None:
        """`streams` [T], distinct: each is a new sequence from now on."""
        ...

    def step(self, streams: Ints, token_ids: Ints | None = None) -> None:
        """Each of `streams` [T] begins its next token; `token_ids` [T] are the tokens that go into the model."""
        ...

    def observe(
        self, layer: int, streams: Ints, ids: Ints, weights: Floats | None = None, hidden: Any | None = None
    ) -> None:
        """The router of `layer` chose `ids` [T, K] with `weights` [T, K] for the rows' `hidden` [T, H]."""
        ...

    def probabilities(self, layer: int, streams: Ints) -> Probabilities:
        """[T, E]: how likely the current token of each stream uses each expert of `layer`; rows sum to about K."""
        ...


@runtime_checkable
class Foresight(Protocol):
    """What a predictor may add: a view on the tokens after the current one, for those who decide what to keep."""

    def upcoming(self, layer: int, streams: Ints) -> Probabilities:
        """[T, E] in 0..1: larger, the sooner the tokens after the current one use an expert of `layer`.

        Asked once `layer` was observed. About discount ** (tokens in between), on average over what may come.
        """
        ...


NEWTON_STEPS = 12
"""The sum is nearly straight in log c until it saturates: most rows need 4 steps, the worst about 10."""


def inclusion(scores: Floats, top_k: int) -> Probabilities:
    """Relative likelihoods [T, E] >= 0 -> probabilities of being among the K chosen; each row sums to K.

    p = 1 - exp(-c score), with c per row such that the sum is K: the chance of at least one hit in as many draws as
    give K different experts. It keeps the order of scores. A little is added to all, where fewer than K are above 0.
    """
    if top_k >= scores.shape[1]:
        return np.ones(scores.shape, dtype=np.float32)
    wide = scores.astype(np.float64)
    share = wide / np.maximum(wide.sum(axis=1, keepdims=True), 1e-300) + 1e-6
    log_c = np.full((len(share), 1), np.log(top_k))
    for _ in range(NEWTON_STEPS):
        survive = np.exp(-np.exp(log_c) * share)
        slope = (survive * share).sum(axis=1, keepdims=True) * np.exp(log_c)
        gap = top_k - (1 - survive).sum(axis=1, keepdims=True)
        if np.abs(gap).max() < 1e-6:
            break
        log_c += np.clip(gap / np.maximum(slope, 1e-9), -2, 2)
    return np.asarray(1 - survive, dtype=np.float32)


def as_probabilities(estimates: Floats, top_k: int) -> Probabilities:
    """Unbiased estimates [T, E] of what was chosen, which noise takes below 0 or above 1 -> within 0..1.

    Each row sums to K, or to a little less where some are certain.
    """
    positive = np.maximum(estimates, 0)
    scale = top_k / np.maximum(positive.sum(axis=1, keepdims=True), 1e-9)
    return np.asarray(np.minimum(positive * np.minimum(scale, 1), 1), dtype=np.float32)
