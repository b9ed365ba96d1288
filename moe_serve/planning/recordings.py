"""What `moe-serve plan` reads: our traces, SGLang's recorder dumps, vLLM's routed experts, EPLB's loads.

    *.npz   a routing trace; or `routed_experts` [tokens, layers, K] as vLLM returns them
    *.npy   [tokens, layers, K] integers (vLLM), or [layers, experts] loads (EPLB)
    *.pt    an SGLang recording: per_token (routes), stat or stat_approx (loads only)

From loads alone only balance can be planned: there are no transitions in them.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_serve.errors import ConfigError, TraceFileError
from moe_serve_base.npz_files import NpzError, NpzFile
from placement.formats import read_load
from predictors import formats, trace
from predictors.trace import RoutingTrace, TraceError


@dataclass(frozen=True)
class Loads:
    """A recording without routes."""

    load: npt.NDArray[np.float64]
    """[L, E]"""
    source: str


def read_recording(paths: Sequence[str], num_experts: int | None) -> RoutingTrace | Loads:
    """Several files must be traces of one model; `num_experts` is needed where the file does not say."""
    recordings = [_read(path, num_experts) for path in paths]
    traces = [recording for recording in recordings if isinstance(recording, RoutingTrace)]
    if len(traces) == len(recordings):
        return trace.merge(traces)
    if len(recordings) > 1:
        raise ConfigError(f"{paths[0]}: loads cannot be taken together with other files; give one file")
    return recordings[0]


def read_routes(paths: Sequence[str], num_experts: int | None = None) -> RoutingTrace:
    """As `read_recording`, where loads do not suffice. TraceFileError."""
    try:
        recording = read_recording(paths, num_experts)
    except (TraceError, ConfigError) as error:
        raise TraceFileError(str(error)) from None
    if isinstance(recording, Loads):
        raise TraceFileError(f"{recording.source}: holds loads only; give a recording with every token's experts")
    return recording


def _read(path: str, num_experts: int | None) -> RoutingTrace | Loads:
    suffix = Path(path).suffix
    if suffix == ".pt":
        return _sglang(path, _torch_load(path), num_experts)
    if suffix == ".npy":
        array = _array(path)
        return Loads(read_load(array), path) if array.ndim == 2 else _vllm(path, array, num_experts)
    if suffix != ".npz":
        raise ConfigError(f"{path}: unknown format; give .npz (trace), .npy (vLLM, EPLB) or .pt (SGLang)")
    routed = _routed_experts(path)
    return trace.load(path) if routed is None else _vllm(path, routed, num_experts)


def _sglang(path: str, dump: Any, num_experts: int | None) -> RoutingTrace | Loads:
    if not isinstance(dump, dict):
        raise ConfigError(f"{path}: is no SGLang recording; it holds a {type(dump).__name__}")
    if "logical_count" in dump:
        return Loads(read_load(dump), path)
    return formats.from_sglang(dump, _required(path, num_experts), source=path)


def _vllm(path: str, rows: npt.NDArray[Any], num_experts: int | None) -> RoutingTrace:
    return formats.from_vllm([rows], _required(path, num_experts), source=path)


def _required(path: str, num_experts: int | None) -> int:
    if num_experts is None:
        raise ConfigError(f"{path}: does not say how many experts a layer has; give --num-experts")
    return num_experts


def _torch_load(path: str) -> Any:
    import torch

    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # many kinds, for a file not its own
        raise ConfigError(f"{path}: cannot be read as a torch file ({type(error).__name__}); record it again") from None


def _array(path: str) -> npt.NDArray[Any]:
    try:
        return np.asarray(np.load(path, allow_pickle=False, mmap_mode="r"))  # mapped: its header may promise too much
    except (OSError, ValueError, EOFError, OverflowError) as error:
        raise ConfigError(f"{path}: cannot be read as .npy without pickles ({error}); save it again") from None


def _routed_experts(path: str) -> npt.NDArray[Any] | None:
    """The array vLLM calls so; None where the file is a trace, or is missing (`trace.load` then says so)."""
    if not Path(path).exists():
        return None
    if not zipfile.is_zipfile(path):
        raise ConfigError(f"{path}: is no whole .npz file; record or copy it again")
    try:
        with NpzFile(path) as file:
            return file.read("routed_experts") if "routed_experts" in file.names else None
    except NpzError as error:
        raise ConfigError(f"{path}: {error}") from None
