"""Trace files by what their names end in: ours, and what other systems record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_serve.errors import TraceFileError

if TYPE_CHECKING:
    from predictors.trace import RoutingTrace

KINDS = "a trace of ours (.npz), an SGLang per-token recording (.pt), or vLLM routed_experts of one completion (.npy)"


def read_traces(paths: Sequence[str], num_experts: int | None) -> RoutingTrace:
    """The files as one trace. `num_experts`: experts per layer, which only our own files say."""
    from predictors.trace import TraceError, merge

    try:
        return merge([_read(path, num_experts) for path in paths])
    except TraceError as error:
        raise TraceFileError(str(error)) from None


def _read(path: str, num_experts: int | None) -> RoutingTrace:
    from predictors.trace import load

    suffix = Path(path).suffix
    if suffix not in (".pt", ".npy"):
        return load(path)
    if num_experts is None:
        raise TraceFileError(f"{path}: does not say how many experts a layer has; give --num-experts")
    return _read_sglang(path, num_experts) if suffix == ".pt" else _read_vllm(path, num_experts)


def _read_sglang(path: str, num_experts: int) -> RoutingTrace:
    import torch

    from predictors.formats import from_sglang

    try:
        dump = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises anything from OSError to UnpicklingError on a bad file
        raise TraceFileError(f"{path}: cannot be read as a torch file of plain data ({error})") from None
    return from_sglang(dump if isinstance(dump, dict) else {}, num_experts, path)


def _read_vllm(path: str, num_experts: int) -> RoutingTrace:
    import numpy as np

    from predictors.formats import from_vllm

    try:
        rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise TraceFileError(f"{path}: cannot be read as .npy without pickles ({error})") from None
    return from_vllm([rows], num_experts, path)
