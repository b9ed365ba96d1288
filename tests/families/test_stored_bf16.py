"""A bf16 checkpoint computed in float32: weights stay bf16 in memory, tokens are those of the widened model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from moe_serve import LLM, SamplingParams, demo
from moe_serve.hf.dense import StoredEmbedding, StoredLinear
from moe_serve_kernels.cpu import library

from .references import compute_reference
from .serving import greedy, load, runner_of, tokens
from .tiny_checkpoints import auto_class, tiny_tokenizer
from .tiny_configs import CASES

pytestmark = pytest.mark.skipif(library.load() is None, reason="C++ kernels are not built here (no compiler)")

SCALED: dict[str, set[type]] = defaultdict(set, gemma4={StoredEmbedding})
"""Gemma's embedding multiplies by a factor in the weights' type, which bf16 would round: it is widened."""
STORED = [name for name in CASES if name != "deepseek_v4"]
"""DeepSeek-V4 is left out: all of its weights are widened."""
TOWERS = (".visual", ".audio_tower")


@pytest.fixture
def bf16_checkpoint(case: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """The case's checkpoint rounded to bf16."""
    model = auto_class(CASES[case].config()).from_pretrained(checkpoint(case), dtype=torch.bfloat16)
    model.bfloat16().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.spanning
@pytest.mark.parametrize("case", STORED)
def test_tokens_are_those_of_the_widened_model(case: str, bf16_checkpoint: Path) -> None:
    ref = compute_reference(bf16_checkpoint)
    assert ref.smallest_margin > 2e-5 * ref.spread
    llm = load(bf16_checkpoint, dtype="float32")
    modules = dict(runner_of(llm).model.named_modules())
    widened = {n for n, m in modules.items() if type(m) in (nn.Linear, nn.Embedding)}
    assert {name.split(".")[-1] for name in widened} == set(runner_of(llm).loaded.family.widened)
    stored = {n: m for n, m in modules.items() if isinstance(m, StoredLinear | StoredEmbedding)}
    assert {type(m) for m in stored.values()} == {StoredLinear, StoredEmbedding} - ({StoredEmbedding} & SCALED[case])
    assert {n: m.weight.dtype for n, m in stored.items()} == {
        n: m.weight.dtype
        for n, m in _as_transformers_loads_it(case, bf16_checkpoint)
        if type(m) in (nn.Linear, nn.Embedding) and n not in widened
    }
    assert tokens(greedy(llm, ref.prompts)) == ref.outputs


def _as_transformers_loads_it(case: str, folder: Path) -> Iterator[tuple[str, nn.Module]]:
    """In bf16, but for what the family keeps in float32 (Hunyuan's gates). Of a composite, the text model."""
    model = auto_class(CASES[case].config()).from_pretrained(folder, dtype=torch.bfloat16)
    for name, module in model.named_modules():
        if CASES[case].tower is None or not any(tower in name for tower in TOWERS):
            yield name.replace("model.language_model.", "model."), module


@pytest.mark.parametrize("case", ["mixtral"])
def test_one_wider_tensor_and_everything_is_widened(case: str, checkpoint: Callable[[str], Path]) -> None:
    """Rounding it to bf16 would change results."""
    llm = load(checkpoint(case), dtype="float32")
    model = runner_of(llm).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(isinstance(module, StoredEmbedding) for module in model.modules())


def test_beside_a_cache_of_experts_no_weight_is_mapped() -> None:
    """Of mapped pages the kernel takes back what it likes when memory is short."""
    folder = str(demo.MODEL)
    prompt, greedy_32 = [[5, 6, 7, 8]], SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    mapped, cached = (LLM(folder, dtype="float32", max_num_seqs=1, moe_cache_mib=n) for n in (0, 1))
    assert any(_is_mapped(p) for p in runner_of(mapped).model.parameters())
    assert not any(_is_mapped(p) for p in runner_of(cached).model.parameters())
    outputs = [llm.generate(prompt, greedy_32)[0].completions[0].token_ids for llm in (mapped, cached)]
    assert outputs[0] == outputs[1]


def _is_mapped(tensor: torch.Tensor) -> bool:
    """Its memory is a file's, by /proc/self/maps."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(address, 16) for address in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return line.endswith(".safetensors")
    raise AssertionError("memory at no known address")
