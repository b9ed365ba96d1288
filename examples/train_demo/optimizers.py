"""Which optimiser trains which parameter."""

import torch
from torch import Tensor
from transformers import MixtralForCausalLM

from examples.train_demo.muon import Muon
from examples.train_demo.recipe import Recipe


def build_optimizers(model: MixtralForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for attention and expert matrices, AdamW for embeddings, norms and routers."""
    plain: list[Tensor] = []
    gated: list[Tensor] = []
    embeddings: list[Tensor] = []
    routers: list[Tensor] = []
    for name, param in model.named_parameters():
        if ".gate.weight" in name:
            routers.append(param)
        elif "embed" in name or param.ndim == 1:
            embeddings.append(param)
        else:
            (gated if name.endswith("gate_up_proj") else plain).append(param)
    groups = [{"params": plain, "parts": 1}, {"params": gated, "parts": 2}]
    muon = Muon(groups, lr=recipe.muon_lr, weight_decay=recipe.weight_decay)
    adam = torch.optim.AdamW(
        [
            {"params": embeddings, "lr": recipe.adam_lr},
            {"params": routers, "lr": recipe.router_lr},
        ],
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=True,
    )
    optimizers: list[torch.optim.Optimizer] = [muon, adam]
    for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
        group["peak_lr"] = group["lr"]
    return optimizers
