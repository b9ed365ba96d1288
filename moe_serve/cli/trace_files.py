"""Trace files for commands that need routes: what moe_serve/planning/recordings.py reads, loads alone excepted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_serve.errors import ConfigError, TraceFileError

if TYPE_CHECKING:
    from predictors.trace import RoutingTrace

KINDS = "a trace of ours (.npz), an SGLang per-token recording (.pt), or vLLM routed_experts (.npy, .npz)"


def read_traces(paths: Sequence[str], num_experts: int | None) -> RoutingTrace:
    """The files as one trace. `num_experts`: experts per layer, which only our own files say."""
    from moe_serve.planning.recordings import read_recording
    from predictors.trace import RoutingTrace, TraceError

    try:
        recording = read_recording(paths, num_experts)
    except (TraceError, ConfigError) as error:
        raise TraceFileError(str(error)) from None
    if not isinstance(recording, RoutingTrace):
        raise TraceFileError(f"{recording.source}: holds loads only; give a recording with every token's experts")
    return recording
