"""From a router's logits to the K experts of each token and their weights, in one launch.

| order | families | weights |
|---|---|---|
| softmax, then top-k | Qwen2-MoE, OLMoE; Qwen3-MoE (renormalized) | the chosen probabilities |
| the same inside the best groups | DeepSeek-V2 (V2-Lite: one group) | the chosen probabilities |
| top-k, then softmax | Mixtral, GPT-OSS, GraniteMoE | softmax over the chosen logits |
| sigmoid, then top-k | DeepSeek-V3, GLM-4.5: by score + bias, inside the best groups | the chosen scores, no bias |

Softmax-then-top-k with renormalising equals top-k-then-softmax. Equal scores: the smaller expert first, where
torch.topk promises nothing. One program per token: K times the best of what is left.

Shape alphabet: T tokens, K choices, E experts, G groups of E / G experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_serve_kernels.routings import Routing


def route(
    logits: torch.Tensor, routing: Routing, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [T, E] any float type, bias [E] float32 -> ids [T, K] int64, weights [T, K] float32, best first."""
    num_tokens, num_experts = logits.shape
    assert num_experts % routing.num_groups == 0
    assert routing.top_k <= num_experts // routing.num_groups * routing.top_groups
    ids = torch.empty(num_tokens, routing.top_k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(num_tokens, routing.top_k, dtype=torch.float32, device=logits.device)
    if num_tokens:
        route_kernel[(num_tokens,)](
            logits.contiguous(),
            logits if bias is None else bias,
            ids,
            weights,
            num_experts,
            routing.scaling,
            TOP_K=routing.top_k,
            SCORE=routing.score,
            RENORMALIZE=routing.renormalize,
            HAS_BIAS=bias is not None,
            GROUPS=routing.num_groups,
            TOP_GROUPS=routing.top_groups,
            BEST_OF_GROUP=routing.best_of_group,
            BLOCK_E=triton.next_power_of_2(num_experts),
            BLOCK_K=triton.next_power_of_2(routing.top_k),
            num_warps=1,
            enable_fp_fusion=True,
        )
    return ids, weights


@triton.jit
def _best(rank, expert, BLOCK_E: tl.constexpr):
    """The expert with the largest rank, the first of equals."""
    return tl.min(tl.where(rank == tl.max(rank, 0), expert, BLOCK_E), 0)


@triton.jit
def _in_best_groups(
    rank,
    expert,
    num_experts,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    BEST_OF_GROUP: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Ranks with -inf outside the best groups; a group is worth the sum of its best."""
    group = expert // (num_experts // GROUPS)
    worth = tl.full([BLOCK_E], float("-inf"), tl.float32)
    for g in tl.static_range(GROUPS):
        own = tl.where(group == g, rank, float("-inf"))
        total = tl.max(own, 0)
        for _ in tl.static_range(BEST_OF_GROUP - 1):
            own = tl.where(expert == _best(own, expert, BLOCK_E), float("-inf"), own)
            following = tl.max(own, 0)
            total += tl.where(following == float("-inf"), 0.0, following)
        worth = tl.where(expert == g, total, worth)
    allowed = tl.zeros([BLOCK_E], tl.int32)
    for _ in tl.static_range(TOP_GROUPS):
        g = _best(worth, expert, BLOCK_E)
        allowed = tl.where(group == g, 1, allowed)
        worth = tl.where(expert == g, float("-inf"), worth)
    return tl.where(allowed == 1, rank, float("-inf"))


@triton.jit
def route_kernel(
    logits_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    num_experts,
    scaling,
    TOP_K: tl.constexpr,
    SCORE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    BEST_OF_GROUP: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (T,)."""
    token = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    choice = tl.arange(0, BLOCK_K)
    inside = expert < num_experts
    logit = tl.load(logits_ptr + token * num_experts + expert, mask=inside, other=float("-inf")).to(tl.float32)
    score = logit
    if SCORE == "sigmoid":
        score = tl.sigmoid(logit)
    if SCORE == "softmax":
        score = tl.exp(logit - tl.max(logit, 0))
        score = score / tl.sum(score, 0)
    rank = score
    if HAS_BIAS:
        rank += tl.load(bias_ptr + expert, mask=inside, other=0.0)
    # -inf is for who cannot be chosen (any more). Were NaN left, an expert would be chosen that does not exist.
    rank = tl.where(rank == rank, tl.maximum(rank, -1e38), -1e38)
    rank = tl.where(inside, rank, float("-inf"))
    if TOP_GROUPS < GROUPS:
        rank = _in_best_groups(rank, expert, num_experts, GROUPS, TOP_GROUPS, BEST_OF_GROUP, BLOCK_E)
    ids = tl.zeros([BLOCK_K], tl.int32)
    weights = tl.full([BLOCK_K], float("-inf"), tl.float32)
    for k in tl.static_range(TOP_K):
        best = _best(rank, expert, BLOCK_E)
        ids = tl.where(choice == k, best, ids)
        weights = tl.where(choice == k, tl.sum(tl.where(expert == best, score, 0.0), 0), weights)
        rank = tl.where(expert == best, float("-inf"), rank)
    if SCORE == "softmax_of_chosen":
        weights = tl.exp(weights - tl.max(weights, 0))
        weights = weights / tl.sum(weights, 0)
    weights = tl.where(choice < TOP_K, weights, 0.0)
    if RENORMALIZE:
        weights = weights / (tl.sum(weights, 0) + 1e-20)
    at = token * TOP_K + choice
    tl.store(ids_ptr + at, ids, mask=choice < TOP_K)
    tl.store(weights_ptr + at, weights * scaling, mask=choice < TOP_K)
