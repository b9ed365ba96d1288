"""TokenUses: which experts each token id used in recorded traffic; the file that --ep-predictor names.

`moe-serve predictor tokens` makes the file from a trace (.npz without pickles): `token_ids` [U], `counts` [U, L, E] and
`layer_ids` [L]. Knows traces; knows no ranks.

Shape alphabet: U token ids that were seen, N tokens, L MoE layers, K choices, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_serve.errors import ConfigError, TraceFileError
from moe_serve_base.npz_files import NpzError, NpzFile
from moe_serve_base.whole_files import whole_file
from predictors.trace import RoutingTrace

FIELDS = ("token_ids", "counts", "layer_ids")


@dataclass(frozen=True, eq=False)
class TokenUses:
    """How often each token id used each expert."""

    token_ids: npt.NDArray[np.int64]
    """[U] ascending."""
    counts: npt.NDArray[np.int64]
    """[U, L, E]"""
    layer_ids: npt.NDArray[np.int64]
    """[L]: each layer's index in the checkpoint."""

    def save(self, path: Path) -> None:
        """Counts in the smallest unsigned type that holds them."""
        narrow = np.min_scalar_type(int(self.counts.max(initial=0)))
        arrays = {"token_ids": self.token_ids, "counts": self.counts.astype(narrow), "layer_ids": self.layer_ids}
        with whole_file(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)

    def check_fit(self, path: str, layers: Sequence[int], num_experts: int) -> None:
        """ConfigError if the model has other MoE layers or another number of experts."""
        for name, ours, models in (
            ("layer_ids", self.layer_ids.tolist(), list(layers)),
            ("experts per layer", self.counts.shape[2], num_experts),
        ):
            if ours != models:
                raise ConfigError(
                    f"--ep-predictor {path}: {name}: {ours}, but this model has {models}; make the file with"
                    " `moe-serve predictor tokens` from a trace of this model"
                )


def count_uses(trace: RoutingTrace) -> TokenUses:
    """TraceFileError if the trace does not have its token ids."""
    if trace.token_ids is None:
        raise TraceFileError(f"{trace.source}: token_ids: missing; record it with `moe-serve trace`, which keeps them")
    token_ids, index = np.unique(trace.token_ids, return_inverse=True)
    counts = np.zeros((len(token_ids), trace.num_layers, trace.num_experts), np.int64)
    for layer in range(trace.num_layers):
        np.add.at(counts[:, layer], (index[:, None], trace.ids[:, layer]), 1)
    return TokenUses(token_ids.astype(np.int64), counts, trace.layer_ids.astype(np.int64))


def load_uses(path: str) -> TokenUses:
    """ConfigError names the field that is wrong."""
    try:
        with NpzFile(path) as file:
            file.require(FIELDS, "a table of uses")
            arrays: dict[str, npt.NDArray[Any]] = {name: file.read(name) for name in FIELDS}
    except NpzError as error:
        raise ConfigError(f"--ep-predictor {path}: {error}; make it with `moe-serve predictor tokens`") from error
    for name, dimensions in zip(FIELDS, (1, 3, 1), strict=True):
        if arrays[name].dtype.kind not in "iu" or arrays[name].ndim != dimensions:
            raise ConfigError(
                f"--ep-predictor {path}: {name}: {arrays[name].dtype} {arrays[name].shape}; integers in {dimensions}"
                f" dimension{'s' * (dimensions > 1)} are needed"
            )
    uses = TokenUses(*(arrays[name].astype(np.int64) for name in FIELDS))
    if uses.counts.shape[:2] != (len(uses.token_ids), len(uses.layer_ids)) or not (np.diff(uses.token_ids) > 0).all():
        raise ConfigError(f"--ep-predictor {path}: counts: {uses.counts.shape} do not go with token_ids and layer_ids")
    return uses
