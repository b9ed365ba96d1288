"""ModelSpec: what the checkpoint is, in our words. Engine, scheduler and server read no field of a HF config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    """Longest sequence; see `_positions`."""
    num_layers: int
    hidden_size: int
    num_experts: int
    """Routed experts of each MoE layer."""
    top_k: int
    """Experts per token."""
    expert_intermediate_size: int
    """Inner width of one routed expert."""
    expert_hidden_size: int
    """Width of an expert's input and output: the model's, or that of a projection before the experts."""

    @staticmethod
    def from_hf(config: Any) -> ModelSpec:
        """Translate a Hugging Face config."""
        dtype = getattr(config, "dtype", None)
        return ModelSpec(
            model_type=config.model_type,
            dtype=dtype if isinstance(dtype, torch.dtype) else torch.float32,
            vocab_size=config.vocab_size,
            max_position_embeddings=_positions(config),
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            num_experts=_first(config, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
            top_k=_first(config, "num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"),
            expert_intermediate_size=_first(config, "moe_intermediate_size", "intermediate_size"),
            expert_hidden_size=_first(config, "moe_latent_size", "hidden_size"),
        )


def _first(config: Any, *names: str) -> int:
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    raise CheckpointError(f"config.json of this {config.model_type} model has none of {', '.join(names)}")


def _positions(config: Any) -> int:
    """The longest sequence the config allows: yarn stretches what the model was trained on by its factor."""
    limit = int(config.max_position_embeddings)
    for rope in _rules(config):
        if rope.get("rope_type", rope.get("type")) == "yarn" and rope.get("factor"):
            limit = round(rope["factor"] * rope.get("original_max_position_embeddings", limit))
    return limit


def _rules(config: Any) -> Iterator[Mapping[str, Any]]:
    """The config's position rules: one, or one per kind of layer."""
    rules = getattr(config, "rope_parameters", None) or {}
    for rule in (rules, *rules.values()):
        if isinstance(rule, Mapping):
            yield rule
