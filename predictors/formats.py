"""Routing recorded by other systems, as a RoutingTrace.

SGLang: `--expert-distribution-recorder-mode per_token` dumps a dict with `records`, one per forward pass, each with
`forward_pass_id`, `positions` (one per token), `extend_seq_lens` (tokens per request in a prefill pass, else None)
and `topk_ids_of_layer` [model layers, tokens, K], -1 where a layer has no router; the caller loads the `.pt` file.
vLLM: `--enable-return-routed-experts` returns `routed_experts` [tokens, MoE layers, K] integers per completion,
and `prompt_routed_experts` of the same form for the prompt.

Knows only numpy: values may be anything `np.asarray` takes, such as CPU tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from predictors.trace import RoutingTrace, TraceError, offsets_of

Array = npt.NDArray[Any]


def from_vllm(completions: Sequence[Any], num_experts: int, source: str = "routed_experts") -> RoutingTrace:
    """One sequence per completion; each [tokens, layers, K] (join a prompt's and its answer's rows first).

    vLLM does not say which layers have a router: they are numbered 0..L-1.
    """
    arrays = [np.asarray(rows) for rows in completions]
    if not arrays:
        raise TraceError(source, "routed_experts", "no completion was given; give at least one array")
    for rows in arrays:
        if rows.ndim != 3 or rows.shape[1:] != arrays[0].shape[1:]:
            raise TraceError(
                source, "routed_experts", f"shape {rows.shape}; give [tokens, layers, top_k], alike in all"
            )
    return RoutingTrace(
        ids=np.concatenate(arrays),
        seq_offsets=offsets_of([len(rows) for rows in arrays]),
        layer_ids=np.arange(arrays[0].shape[1], dtype=np.int32),
        num_experts=num_experts,
        meta={"recorder": "vllm"},
        source=source,
    )


def from_sglang(dump: Mapping[str, Any], num_experts: int, source: str = "dump") -> RoutingTrace:
    """Requests are told apart by position, for the dump does not name them.

    A segment that starts at position p continues the request that stopped before p (the longest waiting one where
    several did), and starts a new one if there is none. Only rank 0's passes count; ids are logical experts.
    """
    records = _records(dump, source)
    requests = _Requests()
    for record in records:
        ids = _layers_first(record, source)
        for start, end in _segments(record, ids.shape[1], source):
            requests.add(int(record["positions"][start]), ids[:, start:end])
    stacked = np.concatenate([np.concatenate(parts, axis=1) for parts in requests.parts], axis=1)
    routed = np.flatnonzero((stacked != -1).any(axis=(1, 2)))
    if not len(routed):
        raise TraceError(source, "topk_ids_of_layer", "no layer has a router; record an MoE model")
    used = (stacked[routed] != -1).any(axis=(0, 1))
    return RoutingTrace(
        ids=stacked[routed][:, :, used].transpose(1, 0, 2),
        seq_offsets=offsets_of([sum(p.shape[1] for p in parts) for parts in requests.parts]),
        layer_ids=routed.astype(np.int32),
        num_experts=num_experts,
        meta={"recorder": "sglang"},
        source=source,
    )


class _Requests:
    """Token rows by request, while they are being told apart."""

    def __init__(self) -> None:
        self.parts: list[list[Array]] = []
        self._next_position: dict[int, int] = {}
        """Request -> position of its next token, the longest waiting first."""

    def add(self, position: int, ids: Array) -> None:
        waiting = [r for r, expected in self._next_position.items() if expected == position and position > 0]
        request = waiting[0] if waiting else len(self.parts)
        if not waiting:
            self.parts.append([])
        self.parts[request].append(ids)
        self._next_position.pop(request, None)
        self._next_position[request] = position + ids.shape[1]


def _records(dump: Mapping[str, Any], source: str) -> list[Mapping[str, Any]]:
    """Rank 0's passes with tokens, in order."""
    fields = ("positions", "topk_ids_of_layer")
    records = [r for r in dump.get("records", []) if r.get("rank", 0) == 0]
    if not records or any(name not in record for record in records for name in fields):
        raise TraceError(
            source, "records", "no per-token records; record with --expert-distribution-recorder-mode per_token"
        )
    with_tokens = [r for r in records if len(r["positions"])]
    if not with_tokens:
        raise TraceError(source, "positions", "no pass has tokens; send requests while recording")
    return sorted(with_tokens, key=lambda record: int(record.get("forward_pass_id", 0)))


def _layers_first(record: Mapping[str, Any], source: str) -> Array:
    ids = np.asarray(record["topk_ids_of_layer"])
    if ids.ndim != 3 or ids.shape[1] != len(record["positions"]):
        tokens = len(record["positions"])
        raise TraceError(source, "topk_ids_of_layer", f"shape {ids.shape}; give [layers, {tokens} tokens, top_k]")
    return ids


def _segments(record: Mapping[str, Any], num_tokens: int, source: str) -> list[tuple[int, int]]:
    """(start, end) rows of each request in one pass: prefill passes give lengths, in decode each row is a request."""
    lengths = record.get("extend_seq_lens")
    bounds = offsets_of([1] * num_tokens if lengths is None else list(lengths)).tolist()
    if bounds[-1] != num_tokens:
        raise TraceError(source, "extend_seq_lens", f"adds up to {bounds[-1]}, but the pass has {num_tokens} tokens")
    return [(start, end) for start, end in itertools.pairwise(bounds) if end > start]
