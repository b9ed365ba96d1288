"""ModelSpec: what the checkpoint is, in our words. Engine, scheduler and server read no field of a HF config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moe_serve.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Facts of a checkpoint that the engine, the scheduler and the server need."""

    model_type: str
    dtype: torch.dtype
    """Of the checkpoint, not of the computation."""
    vocab_size: int
    max_position_embeddings: int
    num_layers: int
    hidden_size: int
    num_experts: int
    """Routed experts of each MoE layer."""
    top_k: int
    """Experts per token."""
    expert_intermediate_size: int
    """Inner width of one routed expert."""

    @staticmethod
    def from_hf(config: Any) -> ModelSpec:
        """Translate a Hugging Face config."""
        dtype = getattr(config, "dtype", None)
        return ModelSpec(
            model_type=config.model_type,
            dtype=dtype if isinstance(dtype, torch.dtype) else torch.float32,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            num_experts=_first(config, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
            top_k=_first(config, "num_experts_per_tok", "moe_k", "moe_topk"),
            expert_intermediate_size=_first(config, "moe_intermediate_size", "intermediate_size"),
        )


def _first(config: Any, *names: str) -> int:
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    raise CheckpointError(f"config.json of this {config.model_type} model has none of {', '.join(names)}")
