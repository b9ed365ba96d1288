"""Experts as one tensor each or stacked in 3-D, in one file or many: the same tokens.

transformers 5.23 saves gpt_oss and granitemoe stacked and the other families per expert, but
checkpoints of either layout are published for most of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from moe_serve.hf.families import family_names
from moe_serve.hf.family import find

from .references import Reference
from .relayout import WEIGHTS, Tensors, copy_with, fuse_experts, reshard, split_experts
from .serving import greedy, load, tokens
from .tiny_checkpoints import write_checkpoint
from .tiny_configs import CASES

Checkpoint = Callable[[str], Path]
References = Callable[[str], Reference]

SAVED_STACKED = (
    "aria",
    "gemma4",
    "gpt_oss",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "llama4",
    "mistral4",
)
NATIVE = [name for name in family_names() if find(name).same_as is None]
"""Not those that are another family under a name of their own."""
ALSO_PUBLISHED_STACKED = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "ernie4_5_moe")


def tensor_names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as handle:
        return list(handle.keys())


@pytest.mark.parametrize("family", NATIVE)
def test_how_transformers_saves_experts(family: str, checkpoint: Checkpoint) -> None:
    """If this changes, the layouts below no longer cover what users have."""
    has_numbers = any(".experts.0." in n for n in tensor_names(checkpoint(family) / WEIGHTS))
    assert has_numbers == (family not in SAVED_STACKED)


def check_fused(tensors: Tensors) -> Tensors:
    fused = fuse_experts(tensors)
    assert any(n.endswith("mlp.experts.gate_up_proj") for n in fused)
    assert not any(".experts.0." in n for n in fused)
    return fused


@pytest.mark.parametrize("family", ALSO_PUBLISHED_STACKED)
def test_fused_experts(family: str, tmp_path: Path, checkpoint: Checkpoint, reference: References) -> None:
    """[E, 2I, H] and [E, H, I] on disk, where transformers would have written E x 3 matrices."""
    folder = copy_with(checkpoint(family), tmp_path, check_fused)
    assert tokens(greedy(load(folder), reference(family).prompts)) == reference(family).outputs


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_fused_and_split_again(family: str, tmp_path: Path, checkpoint: Checkpoint, reference: References) -> None:
    """Per-expert tensors under `mlp.experts.N.gate_proj`, for mixtral too, whose own names differ."""
    folder = copy_with(checkpoint(family), tmp_path, lambda tensors: split_experts(fuse_experts(tensors)))
    assert tokens(greedy(load(folder), reference(family).prompts)) == reference(family).outputs


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "granitemoe"])
def test_sharded_by_transformers(family: str, tmp_path: Path, reference: References) -> None:
    folder = write_checkpoint(CASES[family], tmp_path, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert tokens(greedy(load(folder), reference(family).prompts)) == reference(family).outputs


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_every_expert_in_another_file(
    family: str, tmp_path: Path, checkpoint: Checkpoint, reference: References
) -> None:
    """Seven shards, tensors dealt out in turn: no expert has its three matrices in one file."""
    folder = reshard(checkpoint(family), tmp_path, num_shards=7)
    assert tokens(greedy(load(folder), reference(family).prompts)) == reference(family).outputs
