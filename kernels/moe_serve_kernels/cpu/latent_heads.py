"""What makes a head's keys and values of a token's latents, and how to do without making them (DeepSeek-V2).

    q . (up_k @ latents) = (up_k^T @ q) . latents          sum of w * (up_v @ latents) = up_v @ (sum of w * latents)

So queries are carried over to the latents' space, and what they attend to is carried back: a token's cache is one
narrow row for all heads ("absorbed" projections). For prompts, where many queries meet each key, making them is less
work.

Shape alphabet: T tokens, C of a context, Hq heads, Dv values of a head; rank: latents of a token; plain: values of a
head's key that are not rotated.
"""

from __future__ import annotations

import torch

from moe_serve_kernels.cpu.linear import LinearTable, LinearWeights, linear, linears


class LatentHeads:
    """One layer's heads on a CPU: computed in float32 on weights as they are stored; results of the inputs' dtype."""

    def __init__(self, up: torch.Tensor, plain: int, rounds: bool = False) -> None:
        """`up` [Hq, plain + Dv, rank], float32 or bf16, contiguous: of each head the keys' values that are not rotated,
        then the values. It may not move in memory. `rounds`: as of LinearWeights."""
        self.up = up
        self.plain = plain
        self.into = LinearTable([LinearWeights(head[:plain].T.contiguous(), None, rounds) for head in up])
        """[Hq] of [rank, plain]."""
        self.back = LinearTable([LinearWeights(head[plain:], None, rounds) for head in up])
        """[Hq] of [Dv, rank]."""

    def carry_over(self, query: torch.Tensor) -> torch.Tensor:
        """[Hq, T, plain] -> [Hq, T, rank]."""
        return linears(query.float(), self.into).to(query.dtype)

    def carry_back(self, attended: torch.Tensor) -> torch.Tensor:
        """[Hq, T, rank] -> [Hq, T, Dv]."""
        return linears(attended.float(), self.back).to(attended.dtype)

    def expand(self, latents: torch.Tensor, first: int, count: int) -> torch.Tensor:
        """[C, rank] -> [C, count, plain + Dv] of the heads from `first` on."""
        rows = LinearWeights(self.up[first : first + count].flatten(0, 1))
        return linear(latents.float(), rows).to(latents.dtype).view(len(latents), count, -1)
