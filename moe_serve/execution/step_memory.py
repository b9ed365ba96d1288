"""How a GPU's memory is divided among experts, pages and what a step needs beside them. Integers only.

The experts come first: a model whose experts all fit is served without a cache, and one whose experts do not fit misses
less with each slot. A step's own memory is reserved before, so that neither takes it. Its size follows from the model's
shape; tests/kernels/test_meta_step.py measures the same steps on tensors without memory and holds the two together.

Shape alphabet: T tokens of a step, K choices, H hidden, I intermediate, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_serve.config.units import MIB

FLOAT32_BYTES = 4
ROWS_OF_HIDDEN = 6
"""[T, H] tensors that one layer has at a time: the stream, its norm, queries, what attention gives."""
EXPANDED_BYTES = 256 * MIB
"""Keys and values made of latents at a time (hf/device_attention.py)."""
NODE_BYTES = 8 << 10
"""Of one launch in a captured graph, in the driver: an estimate, from reports of 0.5 to 1 GiB for 100,000 launches."""
LAUNCHES_PER_LAYER = 18
FIXED_BYTES = 768 * MIB
"""Up to half for partial results of attention in the largest graph (tests/kernels/test_meta_step.py). The rest is an
estimate: the libraries' workspaces, loaded kernels, and memory that the allocator cannot give out again."""
LEAST_KV_BYTES = 2048 * MIB
LEAST_KV_SHARE = 0.1
"""All experts leave at least this for pages, the smaller of the two, or what all sequences could use. So GPT-OSS-20B is
resident on 16 GB, with 1 GiB of pages (22,000 tokens)."""
KV_SHARE = 0.25
"""Pages get at most this share where not all experts fit."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """What the size of a step depends on."""

    num_tokens: int
    """The most in a step."""
    num_seqs: int
    """The most that decode in one."""
    num_graphs: int
    num_layers: int
    hidden: int
    inner: int
    """I of one expert."""
    top_k: int
    vocab: int
    latent_dim: int
    """Of a token's row, where the pages hold latents; else 0."""
    max_model_len: int
    itemsize: int
    """Bytes of an activation."""


@dataclass(frozen=True, slots=True)
class Shares:
    """Bytes of a GPU's memory."""

    experts: int
    pages: int


def prompt_bytes(shape: StepShape) -> int:
    """Of the largest step with prompts, beside weights, pages and logits."""
    pairs = shape.num_tokens * shape.top_k
    experts = pairs * (shape.inner * shape.itemsize + shape.hidden * FLOAT32_BYTES)
    around = ROWS_OF_HIDDEN * shape.num_tokens * shape.hidden * shape.itemsize
    latents = EXPANDED_BYTES + shape.max_model_len * shape.latent_dim * shape.itemsize if shape.latent_dim else 0
    return experts + around + latents


def step_bytes(shape: StepShape) -> int:
    """Of prompts, graphs and sampling. Logits: once for all graphs, once more while they are made, twice as float32."""
    logits = shape.num_seqs * shape.vocab * 2 * (shape.itemsize + FLOAT32_BYTES)
    graphs = shape.num_graphs * shape.num_layers * LAUNCHES_PER_LAYER * NODE_BYTES
    return FIXED_BYTES + prompt_bytes(shape) * 5 // 4 + logits + graphs


def least_kv_bytes(left: int) -> int:
    """Of pages beside all experts, of `left` bytes for both."""
    return min(LEAST_KV_BYTES, int(left * LEAST_KV_SHARE))


def divide(free: int, step: int, experts: int, pages: int) -> Shares:
    """`free` bytes less `step`; `experts` and `pages`: what all of them would take. Neither share is negative."""
    left = max(0, free - step)
    if experts + min(pages, least_kv_bytes(left)) <= left:
        return Shares(experts, min(pages, left - experts))
    for_pages = min(pages, int(left * KV_SHARE))
    return Shares(min(experts, left - for_pages), for_pages)
