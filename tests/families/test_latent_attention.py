"""DeepSeek's attention on cached latents: what is cached, and that neither way to attend to it changes a token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe_serve.hf import latent_attention
from moe_serve.hf.latent_attention import LatentProjections, TorchHeads
from moe_serve_kernels.cpu import expert_mlp, library, paged_attention
from moe_serve_kernels.cpu.latent_heads import LatentHeads

from .references import Reference
from .serving import greedy, load, runner_of, tokens
from .tiny_configs import LATENT_ATTENTION

Checkpoint = Callable[[str], Path]
References = Callable[[str], Reference]
CASES = ["deepseek_v2", "deepseek_v2_lite", "deepseek_v3"]
needs_library = pytest.mark.skipif(library.load() is None, reason="C++ kernels are not built here (no compiler)")


@pytest.mark.parametrize("case", CASES)
def test_a_token_takes_one_row_for_all_heads(case: str, checkpoint: Checkpoint) -> None:
    cache = runner_of(load(checkpoint(case), num_kv_pages=8, block_size=16)).kv_cache
    width = LATENT_ATTENTION["kv_lora_rank"] + LATENT_ATTENTION["qk_rope_head_dim"]
    assert cache.num_bytes == len(cache.layers) * 9 * 16 * width * 4  # a page more than the scheduler's
    for layer in cache.layers.values():
        assert sum(data.untyped_storage().nbytes() for data in layer.stored) * len(cache.layers) == cache.num_bytes
        assert layer.values.data_ptr() == layer.keys.data_ptr()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tokens_at_once", [16, 256])
def test_a_few_heads_at_a_time(
    case: str, tokens_at_once: int, checkpoint: Checkpoint, reference: References, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_attention, "EXPANDED_BYTES", 4096)
    ref = reference(case)
    llm = load(checkpoint(case), max_num_batched_tokens=tokens_at_once)
    assert tokens(greedy(llm, ref.prompts)) == ref.outputs


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("gathered", [True, False])
def test_without_kernels_for_heads(
    case: str, gathered: bool, checkpoint: Checkpoint, reference: References, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in bf16 and on GPUs: torch carries queries over; and machines without a compiler gather pages."""
    monkeypatch.setattr(expert_mlp, "is_available", lambda *_: False)
    if gathered:
        monkeypatch.setattr(paged_attention, "is_available", lambda *_: False)
    ref = reference(case)
    llm = load(checkpoint(case), enforce_eager=True)
    # Not the heads that an earlier test of this model has left behind.
    monkeypatch.setattr(LatentProjections, "heads", property(LatentProjections.make_heads))
    assert tokens(greedy(llm, ref.prompts)) == ref.outputs


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_kinds_of_heads_are_alike(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    up = (torch.randn(5, 12 + 7, 40) / 6).to(dtype)
    stored, plain = LatentHeads(up, 12), TorchHeads(up.float(), 12)
    query, attended, latents = torch.randn(5, 9, 12), torch.randn(5, 9, 40), torch.randn(300, 40)
    torch.testing.assert_close(stored.carry_over(query), plain.carry_over(query), rtol=0, atol=1e-5)
    torch.testing.assert_close(stored.carry_back(attended), plain.carry_back(attended), rtol=0, atol=1e-5)
    torch.testing.assert_close(stored.expand(latents, 1, 3), plain.expand(latents, 1, 3), rtol=0, atol=1e-5)
    assert stored.carry_over(query[:, :0]).shape == (5, 0, 40)
