"""What a GPU's step launches, keeps alive and takes from the host, for models of full size, without a GPU.

The limits are what the code reaches today. A change that lowers one lowers the number here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest

from moe_serve.execution.step_memory import FIXED_BYTES, prompt_bytes

from ..families.tiny_configs import CASES
from ..support.full_sizes import FIELDS, LAYERS, SEQS, full_size, step_shape

if TYPE_CHECKING:
    from ..support.meta_step import MetaModel, Noted

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed here")
MIB, TOKENS = 1 << 20, 2048
NUM_PAGES = 2100
"""For one context of 32,768 tokens."""
DECODING = {
    "mixtral": (11.75, 13.75),
    "qwen3_moe": (11.75, 13.75),
    "gpt_oss": (11.75, 13.75),
    "deepseek_v2": (15.75, 17.25),
}
"""Launches of a step per layer, of 1 and of 16 sequences; 3 of the step are outside all layers."""
LARGEST_GRAPH = {"mixtral": 80, "qwen3_moe": 86, "gpt_oss": 140, "deepseek_v2": 288}
"""MiB that a graph of 128 sequences keeps alive."""
PROMPTS = {"mixtral": (15.5, 245), "qwen3_moe": (15.5, 190), "gpt_oss": (15.5, 185), "deepseek_v2": (19.5, 405)}
"""Launches of a step with prompts per layer, and the MiB that 2,048 tokens at a context of 32,768 keep alive."""
WAITING = {"deepseek_v32", "deepseek_v4", "axk2", "axk2_light", "glm_moe_dsa", "llama4"}
"""Tiny models whose attention asks the device for a value: what an indexer chose, how long a chunk is."""
QUICK = {"phimoe", "llama4", "gpt_oss"}
TEXT = [name for name in CASES if name not in ("qwen3_vl_moe", "qwen3_omni_moe", "glm4v_moe")]
"""Those are Qwen3-MoE and GLM-4.5 under configs that transformers builds no text model from."""
MIXED = {"minimax"}
"""A float32 state meets bf16 values in its modules: it runs on no GPU in bf16 yet."""


@pytest.fixture(scope="module")
def made() -> Iterator[Callable[[str], MetaModel]]:
    """A full-size model, made once."""
    from ..support.meta_step import MetaModel

    models: list[MetaModel] = []

    @cache
    def make(model_type: str) -> MetaModel:
        models.append(MetaModel(full_size(model_type), NUM_PAGES))
        return models[-1]

    yield make
    for model in models:
        model.close()


def step_of(config: Any, *step: int) -> Noted:
    from ..support.meta_step import MetaModel

    model = MetaModel(config, num_pages=64)
    try:
        return model.step(*step)
    finally:
        model.close()


@pytest.mark.parametrize("model", FIELDS)
def test_decoding(made: Callable[[str], MetaModel], model: str) -> None:
    for num_seqs, launches in zip((1, 16), DECODING[model], strict=True):
        noted = made(model).step(num_seqs, 512, 1)
        assert noted.from_host == []
        assert noted.kernels["route_kernel"] > 0
        assert noted.launches / LAYERS <= launches, noted


@pytest.mark.parametrize("model", FIELDS)
def test_sizing_leaves_room_for_the_largest_graph(made: Callable[[str], MetaModel], model: str) -> None:
    """Its attention keeps partial results for the longest context that there may be."""
    noted = made(model).graph(SEQS)
    assert noted.from_host == []
    assert noted.peak_bytes <= FIXED_BYTES // 2, noted.peak_at
    assert noted.peak_bytes / MIB <= LARGEST_GRAPH[model], noted.peak_at


@pytest.mark.parametrize("model", FIELDS)
def test_a_part_of_a_long_prompt(made: Callable[[str], MetaModel], model: str) -> None:
    """What sizing reserves for it holds it."""
    noted = made(model).step(1, 32768, TOKENS)
    launches, mib = PROMPTS[model]
    assert noted.from_host == []
    assert noted.launches / LAYERS <= launches, noted
    assert noted.peak_bytes / MIB <= mib, noted.peak_at
    assert noted.peak_bytes <= prompt_bytes(step_shape(model, TOKENS))


@pytest.mark.parametrize("model", FIELDS)
def test_many_prompts_take_as_many_launches_as_one(made: Callable[[str], MetaModel], model: str) -> None:
    noted = made(model).step(16, 128, 128)
    assert noted.launches / LAYERS <= PROMPTS[model][0], noted


@pytest.mark.parametrize("case", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in TEXT])
def test_nothing_of_a_decoding_step_comes_from_the_host(case: str) -> None:
    """A copy from memory that is not pinned ends a capture with an error, and so does a question to the device."""
    config = CASES[case].config()
    if case in WAITING:
        with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
            step_of(config, 3, 40, 1)
    elif case in MIXED:
        with pytest.raises(RuntimeError, match="expected scalar type"):
            step_of(config, 3, 40, 1)
    else:
        noted = step_of(config, 3, 40, 1)
        assert noted.from_host == []
