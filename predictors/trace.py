"""RoutingTrace: which experts every token went to, in order; one file feeds replay, predictors and placement.

Files are `.npz` without pickles: `ids` [N, L, K], `seq_offsets` [S+1], `layer_ids` [L], `n_experts`, `top_k`,
`probs` [N, L, K] (optional; floats, or uint8 meaning value / 255), `token_ids` [N] (optional), `meta` (JSON as
bytes; `fingerprint` there names the checkpoint). Other systems' recordings are read in `formats.py`. Knows neither
caches nor models.

Shape alphabet: N tokens, L MoE layers, K experts per token, E experts per layer, S sequences.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from moe_serve_base.npz_files import NpzError, NpzFile
from moe_serve_base.whole_files import whole_file

MAX_EXPERTS = np.iinfo(np.int16).max
REQUIRED_FIELDS = ("ids", "seq_offsets", "layer_ids", "n_experts")
OPTIONAL_FIELDS = ("probs", "token_ids", "meta")


class TraceError(ValueError):
    """A trace that cannot be used. The message names the file, the field and the fix."""

    def __init__(self, source: str, field: str, problem: str) -> None:
        super().__init__(f"{source}: {field}: {problem}")
        self.source = source
        self.field = field


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """Row n of `ids` is one token, the same in every layer. Checked when made: raises TraceError."""

    ids: npt.NDArray[Any]
    """[N, L, K] expert ids, best first where the recorder kept that order; uint8, or int16 for E > 256."""
    seq_offsets: npt.NDArray[np.int64]
    """[S+1]: sequence s is rows seq_offsets[s] to seq_offsets[s+1]."""
    layer_ids: npt.NDArray[np.int32]
    """[L]: each layer's index in the checkpoint; dense layers are left out."""
    num_experts: int
    weights: npt.NDArray[np.float32] | None = None
    """[N, L, K] router weights, or None where they were not recorded."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    source: str = "trace"
    """What error messages call this trace: its file, as a rule."""
    token_ids: npt.NDArray[np.int32] | None = None
    """[N]: the tokens themselves, or None where they were not recorded."""

    def __post_init__(self) -> None:
        _Check(self).run()
        narrow = np.uint8 if self.num_experts <= 256 else np.int16
        object.__setattr__(self, "ids", np.ascontiguousarray(self.ids, dtype=narrow))
        object.__setattr__(self, "seq_offsets", np.asarray(self.seq_offsets, dtype=np.int64))
        object.__setattr__(self, "layer_ids", np.asarray(self.layer_ids, dtype=np.int32))
        if self.weights is not None:
            object.__setattr__(self, "weights", np.ascontiguousarray(self.weights, dtype=np.float32))
        if self.token_ids is not None:
            object.__setattr__(self, "token_ids", np.ascontiguousarray(self.token_ids, dtype=np.int32))

    @property
    def num_tokens(self) -> int:
        return int(self.ids.shape[0])

    @property
    def num_layers(self) -> int:
        return int(self.ids.shape[1])

    @property
    def top_k(self) -> int:
        return int(self.ids.shape[2])

    @property
    def num_sequences(self) -> int:
        return len(self.seq_offsets) - 1

    def sequence_slices(self) -> Iterator[slice]:
        """Rows of each sequence, in order."""
        for start, end in zip(self.seq_offsets[:-1].tolist(), self.seq_offsets[1:].tolist(), strict=True):
            yield slice(start, end)

    def popularity(self) -> npt.NDArray[np.float64]:
        """[L, E]: the fraction of tokens that use each expert; rows sum to K."""
        counts = [
            np.bincount(self.ids[:, layer].ravel(), minlength=self.num_experts) for layer in range(self.num_layers)
        ]
        return np.asarray(np.stack(counts) / self.num_tokens, dtype=np.float64)

    def select(self, sequences: Sequence[int]) -> RoutingTrace:
        """The given sequences, in the given order."""
        slices = list(self.sequence_slices())
        for s in sequences:
            if not 0 <= s < len(slices):
                self._fail("seq_offsets", f"there is no sequence {s}; choose from 0 to {len(slices) - 1}")
        if not sequences:
            self._fail("seq_offsets", "no sequence was selected; select at least one")
        rows = np.concatenate([np.arange(slices[s].start, slices[s].stop) for s in sequences])
        lengths = [slices[s].stop - slices[s].start for s in sequences]
        return replace(
            self,
            ids=self.ids[rows],
            weights=None if self.weights is None else self.weights[rows],
            token_ids=None if self.token_ids is None else self.token_ids[rows],
            seq_offsets=offsets_of(lengths),
        )

    def head(self, num_tokens: int) -> RoutingTrace:
        """The first `num_tokens` tokens; the last sequence may be cut."""
        if num_tokens >= self.num_tokens:
            return self
        if num_tokens < 1:
            self._fail("ids", f"cannot keep {num_tokens} tokens; keep at least 1")
        inside = self.seq_offsets[self.seq_offsets < num_tokens]
        return replace(
            self,
            ids=self.ids[:num_tokens],
            weights=None if self.weights is None else self.weights[:num_tokens],
            token_ids=None if self.token_ids is None else self.token_ids[:num_tokens],
            seq_offsets=np.append(inside, num_tokens),
        )

    def save(self, path: str | Path) -> None:
        """Write the `.npz`; weights as float16. OutputError (an OSError) where it cannot be written."""
        arrays: dict[str, Any] = {
            "ids": self.ids,
            "seq_offsets": self.seq_offsets,
            "layer_ids": self.layer_ids,
            "n_experts": np.int32(self.num_experts),
            "top_k": np.int32(self.top_k),
            "meta": np.frombuffer(json.dumps(dict(self.meta)).encode(), dtype=np.uint8),
        }
        if self.weights is not None:
            arrays["probs"] = self.weights.astype(np.float16)
        if self.token_ids is not None:
            arrays["token_ids"] = self.token_ids
        with whole_file(Path(path)) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **arrays)

    def _fail(self, field: str, problem: str) -> NoReturn:
        raise TraceError(self.source, field, problem)


def load(path: str | Path) -> RoutingTrace:
    """Read one `.npz`. Raises TraceError, also where the file is missing or no npz."""
    source = str(path)
    try:
        arrays = _read_arrays(source)
    except NpzError as error:
        raise TraceError(source, error.field, error.problem) from None
    return RoutingTrace(
        ids=arrays["ids"],
        seq_offsets=arrays["seq_offsets"],
        layer_ids=arrays["layer_ids"],
        num_experts=_scalar(arrays["n_experts"], source, "n_experts"),
        weights=_weights(arrays.get("probs")),
        token_ids=arrays.get("token_ids"),
        meta=_meta(arrays.get("meta"), source),
        source=source,
    )


def merge(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    """The traces one after another; they must agree on layers, experts and K. What not all of them have is left out."""
    if not traces:
        raise TraceError("trace", "ids", "no trace was given; give at least one file")
    first = traces[0]
    if len(traces) == 1:
        return first
    for other in traces[1:]:
        _check_same_model(first, other)
    weights = [trace.weights for trace in traces if trace.weights is not None]
    token_ids = [trace.token_ids for trace in traces if trace.token_ids is not None]
    return replace(
        first,
        ids=np.concatenate([trace.ids for trace in traces]),
        weights=np.concatenate(weights) if len(weights) == len(traces) else None,
        token_ids=np.concatenate(token_ids) if len(token_ids) == len(traces) else None,
        seq_offsets=offsets_of(np.concatenate([np.diff(trace.seq_offsets) for trace in traces])),
        meta={"merged": [dict(trace.meta) for trace in traces]},
        source=" + ".join(trace.source for trace in traces),
    )


def offsets_of(lengths: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """[S] lengths -> [S+1] offsets."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _check_same_model(first: RoutingTrace, other: RoutingTrace) -> None:
    for field_name, one, two in (
        ("n_experts", first.num_experts, other.num_experts),
        ("top_k", first.top_k, other.top_k),
        ("layer_ids", first.layer_ids.tolist(), other.layer_ids.tolist()),
    ):
        if one != two:
            raise TraceError(other.source, field_name, f"{two}, but {one} in {first.source}; merge one model's traces")


def _read_arrays(source: str) -> dict[str, npt.NDArray[Any]]:
    """The small ones first: they say how large the others may be."""
    with NpzFile(source) as file:
        file.require(REQUIRED_FIELDS, "a trace")
        offsets, ids = file.read("seq_offsets"), file.header("ids")
        num_tokens = ids.shape[0] if ids.shape else 0
        if offsets.dtype.kind in "iu" and offsets.size and offsets.flat[-1] != num_tokens:
            raise NpzError("seq_offsets", f"ends at {offsets.flat[-1]} tokens, but ids has {num_tokens}")
        return {name: file.read(name) for name in (*REQUIRED_FIELDS, *OPTIONAL_FIELDS) if name in file.names}


def _scalar(array: npt.NDArray[Any], source: str, field: str) -> int:
    if array.shape != () or array.dtype.kind not in "iu":
        raise TraceError(source, field, f"is {array.dtype} {array.shape}; give one integer")
    return int(array)


def _weights(probs: npt.NDArray[Any] | None) -> npt.NDArray[np.float32] | None:
    if probs is None:
        return None
    scale = 255 if probs.dtype == np.uint8 else 1
    return np.asarray(probs.astype(np.float32) / scale, dtype=np.float32) if probs.dtype.kind in "fiu" else probs


def _meta(array: npt.NDArray[Any] | None, source: str) -> dict[str, Any]:
    if array is None:
        return {}
    try:
        meta = json.loads(bytes(array))
    except ValueError:
        raise TraceError(source, "meta", "is not JSON; store json.dumps(...).encode() as uint8") from None
    if not isinstance(meta, dict):
        raise TraceError(source, "meta", f"is a JSON {type(meta).__name__}; store an object")
    return meta


class _Check:
    """Everything a trace must satisfy, one method per field, in an order that lets each rely on those before."""

    def __init__(self, trace: RoutingTrace) -> None:
        self.trace = trace

    def run(self) -> None:
        self.ids_shape()
        self.num_experts()
        self.ids_values()
        self.seq_offsets()
        self.layer_ids()
        self.weights()
        self.token_ids()

    def ids_shape(self) -> None:
        ids = self.trace.ids
        if ids.ndim != 3 or 0 in ids.shape:
            self.trace._fail("ids", f"has shape {ids.shape}; give [tokens, layers, top_k], none of them 0")
        if ids.dtype.kind not in "iu":
            self.trace._fail("ids", f"is {ids.dtype}; give integers")

    def num_experts(self) -> None:
        experts, top_k = self.trace.num_experts, self.trace.ids.shape[2]
        if not top_k <= experts <= MAX_EXPERTS:
            self.trace._fail("n_experts", f"is {experts}; it lies between top_k = {top_k} and {MAX_EXPERTS}")

    def ids_values(self) -> None:
        ids, experts = self.trace.ids, self.trace.num_experts
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= experts:
            bad = low if low < 0 else high
            self.trace._fail(
                "ids", f"holds expert {bad}; ids lie in 0..{experts - 1}: correct n_experts or drop padding"
            )
        ordered = np.sort(ids, axis=2)
        twice = np.argwhere(ordered[:, :, 1:] == ordered[:, :, :-1])
        if len(twice):
            n, layer = twice[0, :2].tolist()
            self.trace._fail("ids", f"token {n} uses an expert twice in layer {layer}; a token's experts are distinct")

    def seq_offsets(self) -> None:
        offsets, tokens = self.trace.seq_offsets, self.trace.ids.shape[0]
        if offsets.ndim != 1 or len(offsets) < 2 or offsets.dtype.kind not in "iu":
            self.trace._fail("seq_offsets", f"is {offsets.dtype} {offsets.shape}; give integers [sequences + 1]")
        if offsets[0] != 0 or offsets[-1] != tokens:
            self.trace._fail(
                "seq_offsets", f"runs {offsets[0]}..{offsets[-1]}; it starts at 0 and ends at {tokens} tokens"
            )
        if (offsets[1:] <= offsets[:-1]).any():
            self.trace._fail("seq_offsets", "does not increase everywhere; leave empty sequences out")

    def layer_ids(self) -> None:
        layers = self.trace.layer_ids
        if layers.shape != (self.trace.ids.shape[1],) or layers.dtype.kind not in "iu":
            expected = self.trace.ids.shape[1]
            self.trace._fail(
                "layer_ids", f"is {layers.dtype} {layers.shape}; give one integer for each of {expected} layers"
            )
        if layers[0] < 0 or (layers[1:] <= layers[:-1]).any():
            self.trace._fail("layer_ids", "is not ascending from 0 or above; order the layers as the model runs them")

    def weights(self) -> None:
        weights = self.trace.weights
        if weights is None:
            return
        if weights.shape != self.trace.ids.shape or weights.dtype.kind != "f":
            self.trace._fail(
                "probs", f"is {weights.dtype} {weights.shape}; give floats of ids' shape {self.trace.ids.shape}"
            )
        if not np.isfinite(weights).all() or (weights < 0).any():
            self.trace._fail("probs", "holds a negative or non-finite weight; give router weights after softmax")

    def token_ids(self) -> None:
        ids = self.trace.token_ids
        if ids is None:
            return
        tokens = self.trace.ids.shape[0]
        if ids.shape != (tokens,) or ids.dtype.kind not in "iu":
            self.trace._fail("token_ids", f"is {ids.dtype} {ids.shape}; give one integer for each of {tokens} tokens")
        if ids.min() < 0:
            self.trace._fail("token_ids", f"holds {int(ids.min())}; give ids of the tokenizer's vocabulary")
