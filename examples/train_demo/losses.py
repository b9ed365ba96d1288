"""The training objective: next-token loss, router load balancing and router z-loss."""

import torch
from torch import Tensor
from torch.nn import functional
from transformers import MixtralForCausalLM

from examples.train_demo.recipe import Recipe


def router_losses(router_logits: tuple[Tensor, ...], top_k: int) -> tuple[Tensor, Tensor]:
    """Load-balancing loss and z-loss summed over layers, from [tokens, experts] logits each.

    The balancing term of a layer is experts * sum(share of choices * mean probability), which
    is 1 when the load is even; it is taken per layer, so one layer cannot make up for another.
    """
    balance, z_loss = torch.zeros(()), torch.zeros(())
    for logits in router_logits:
        count = logits.shape[-1]
        probabilities = logits.softmax(dim=-1)
        chosen = probabilities.detach().topk(top_k, dim=-1).indices
        share = torch.bincount(chosen.flatten(), minlength=count) / chosen.numel()
        balance = balance + count * (share * probabilities.mean(dim=0)).sum()
        z_loss = z_loss + logits.logsumexp(dim=-1).square().mean()
    return balance, z_loss


def forward_loss(model: MixtralForCausalLM, batch: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
    """Total loss, language-model loss (nats per token) and mean balancing term of [rows, T + 1]."""
    output = model.model(batch[:, :-1], output_router_logits=True, use_cache=False)
    logits = model.lm_head(output.last_hidden_state)
    nats = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    balance, z_loss = router_losses(output.router_logits, model.config.num_experts_per_tok)
    total = nats + recipe.balance * balance + recipe.z_loss * z_loss
    return total, nats.detach(), balance.detach() / len(output.router_logits)
