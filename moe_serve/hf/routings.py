"""How each family's router chooses, from its config: what our routing kernel is told. Knows no modules.

None: in a way that the kernel does not know, and the family's own router stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from moe_serve_kernels.routings import Routing

RoutingOf = Callable[[Any], Routing | None]
"""From the HF config."""


def unknown(config: Any) -> Routing | None:
    """Left to the family's own code."""
    return None


def softmax(config: Any) -> Routing | None:
    """Probabilities over all experts, divided by their sum over the chosen ones where the config says so."""
    return Routing(config.num_experts_per_tok, "softmax", renormalize=config.norm_topk_prob)


def renormalized(config: Any) -> Routing | None:
    """The same, always divided."""
    return Routing(config.num_experts_per_tok, "softmax", renormalize=True)


def softmax_of_chosen(config: Any) -> Routing | None:
    """Probabilities over the chosen experts alone."""
    return Routing(config.num_experts_per_tok, "softmax_of_chosen")


def greedy(config: Any) -> Routing | None:
    """DeepSeek-V2's scaled probabilities, of the best groups alone where the config says so. As transformers, it knows
    no `norm_topk_prob`."""
    routing = Routing(config.num_experts_per_tok, "softmax", scaling=config.routed_scaling_factor)
    if config.topk_method == "group_limited_greedy":
        return replace(routing, num_groups=config.n_group, top_groups=config.topk_group, best_of_group=1)
    return routing if config.topk_method == "greedy" else None


def renormalized_sigmoid(config: Any) -> Routing | None:
    """A score for each expert by itself, divided by the sum over the chosen ones."""
    return Routing(config.num_experts_per_tok, "sigmoid", renormalize=True)


def sigmoid_in_groups(config: Any) -> Routing | None:
    """DeepSeek-V3's scores, chosen by score and correction in the best groups; where n_group is None, among all."""
    return Routing(
        config.num_experts_per_tok,
        "sigmoid",
        renormalize=config.norm_topk_prob,
        scaling=config.routed_scaling_factor,
        num_groups=config.n_group or 1,
        top_groups=config.topk_group or 1,
    )
