"""What transformers' own `generate` says: the tokens every run of ours must reproduce.

One prompt at a time, without padding and with the plain loop over experts, so that nothing but
the model's definition decides. Knows nothing of moe_serve.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from .tiny_checkpoints import auto_class
from .tiny_configs import VOCAB

NEW_TOKENS = 12
PROMPT_LENGTHS = (1, 3, 16, 41, 48, 70)
"""Tokens; 16 and 48 end exactly on a page. The last three share their first 32, i.e. full pages of 4 and of 16."""
SHARED = 32


@dataclass(frozen=True)
class Reference:
    """Greedy continuations of the test prompts, and how close to a tie they came."""

    prompts: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    smallest_margin: float
    """Least difference between the best and the second logit over all steps."""
    spread: float
    """Standard deviation of the logits, the scale of `smallest_margin`."""
    routes: tuple[torch.Tensor, ...]
    """Router output of the longest prompt, per MoE layer: chosen experts [T, K]."""


def make_prompts(seed: int = 1) -> tuple[tuple[int, ...], ...]:
    """Six prompts of very different length, random bytes."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, VOCAB - 1, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]
    return tuple(tuple(rows[-1][:SHARED] + r[SHARED:]) if len(r) > SHARED else tuple(r) for r in rows)


def compute_reference(folder: Path) -> Reference:
    """Run `generate` on a checkpoint folder, prompt by prompt."""
    config = AutoConfig.from_pretrained(folder)
    model = auto_class(config).from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    model.eval()
    prompts = make_prompts()
    outputs, scores = zip(*(_greedy(model, p) for p in prompts), strict=True)
    logits = torch.cat(scores)
    best = logits.topk(2, dim=-1).values
    margin = (best[:, 0] - best[:, 1]).min().item()
    return Reference(prompts, outputs, margin, logits.std().item(), record_routes(model, prompts[-1]))


def _greedy(model: Any, prompt: tuple[int, ...]) -> tuple[tuple[int, ...], torch.Tensor]:
    """NEW_TOKENS token ids and their logits [NEW_TOKENS, V]."""
    done = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return tuple(done.sequences[0, len(prompt) :].tolist()), torch.cat(done.logits)


def record_routes(model: Any, prompt: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """The experts each MoE layer chose for each token of a prompt."""
    routes: list[torch.Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args: routes.append(_chosen(module, *args[:2])))
        for name, module in model.named_modules()
        if name.endswith(".experts")
    ]
    with torch.inference_mode():
        model(torch.tensor([prompt]))
    for hook in hooks:
        hook.remove()
    return tuple(routes)


def _chosen(experts: Any, hidden: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
    """[T, K]. Llama 4 names none: each expert gets a copy of every token, [E * T, H], zeros where not chosen."""
    if ids is not None:
        return ids
    copies = hidden.view(experts.num_experts, -1, hidden.shape[-1])
    return copies.abs().sum(dim=-1).argmax(dim=0)[:, None]
