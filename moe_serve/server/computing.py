"""How this server computes: what /version, the start log and the metrics say. Results depend on it, and speed does."""

from __future__ import annotations

from moe_serve.config import EngineConfig
from moe_serve_kernels.cpu import library


def computing(config: EngineConfig) -> dict[str, str]:
    """`config` must be resolved. instruction_set: what the C++ kernels use; torch: they are not there or not for this
    device."""
    native = library.load() if config.device == "cpu" else None
    return {
        "device": config.device,
        "dtype": config.dtype,
        "instruction_set": "torch" if native is None else native.isa,
        "threads": str(config.num_threads),
    }
