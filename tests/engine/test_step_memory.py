"""How a GPU's memory is divided, for six sizes of it and five models at full size.

Bytes of the dense parts are estimates; those of experts and pages follow from the models' shapes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from moe_serve.execution.step_memory import StepShape, divide, least_kv_bytes, step_bytes

from ..support.full_sizes import ALL_LAYERS, SEQS, step_shape

GIB = 1 << 30
DRIVER_BYTES = GIB // 2
CARDS = (12, 16, 24, 48, 80, 141)
"""GB as they are sold, a little less than so many GiB."""
TOKENS = 2048


@dataclass(frozen=True)
class Model:
    shape: str
    experts: int
    """Bytes of all."""
    dense: float
    token: int
    """Bytes of a token's keys and values."""
    positions: int
    layers: int | None = None
    """Where it has another number than the model of its shape."""

    def step(self) -> StepShape:
        return replace(step_shape(self.shape, TOKENS), num_layers=self.layers or ALL_LAYERS[self.shape])


GPT_OSS_EXPERT = 3 * 2880 * 2880 * 17 // 32 + 3 * 2880 * 4
"""4.25 bits a weight, and biases: what a miss moves."""
MODELS = {
    "mixtral": Model("mixtral", 256 * 3 * 4096 * 14336 * 2, 3.2e9, 32 * 8 * 128 * 4, 32768),
    "mixtral int4": Model("mixtral", 256 * 3 * 4096 * 14336 * 9 // 16, 3.2e9, 32 * 8 * 128 * 4, 32768),
    "qwen3": Model("qwen3_moe", 6144 * 3 * 2048 * 768 * 2, 3.06e9, 48 * 4 * 128 * 4, 40960),
    "gpt_oss": Model("gpt_oss", 768 * GPT_OSS_EXPERT, 3.3e9, 24 * 8 * 64 * 4, 131072),
    "gpt_oss 120b": Model("gpt_oss", 36 * 128 * GPT_OSS_EXPERT, 4.2e9, 36 * 8 * 64 * 4, 131072, layers=36),
    "deepseek": Model("deepseek_v2", 1664 * 3 * 2048 * 1408 * 2, 2.9e9, 27 * 576 * 2, 163840),
}
RESIDENT = {
    "mixtral": (141,),
    "mixtral int4": (48, 80, 141),
    "qwen3": (80, 141),
    "gpt_oss": (16, 24, 48, 80, 141),
    "gpt_oss 120b": (80, 141),
    "deepseek": (48, 80, 141),
}
"""Cards that hold all experts."""


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("name", MODELS)
def test_what_fits_is_resident_and_a_step_fits_beside_it(name: str, card: int) -> None:
    model = MODELS[name]
    free = int(card * 0.99 * GIB - DRIVER_BYTES - model.dense)
    step, pages = step_bytes(model.step()), SEQS * model.positions * model.token
    shares = divide(free, step, model.experts, pages)
    assert (shares.experts == model.experts) == (card in RESIDENT[name])
    assert free - shares.experts - shares.pages >= step
    assert shares.pages >= min(least_kv_bytes(free - step), (free - step) // 4 - 1)
    assert shares.experts > 0


def test_pages_take_what_resident_experts_leave() -> None:
    shares = divide(free=60 * GIB, step=2 * GIB, experts=20 * GIB, pages=100 * GIB)
    assert (shares.experts, shares.pages) == (20 * GIB, 38 * GIB)
    assert divide(60 * GIB, 2 * GIB, 20 * GIB, pages=GIB).pages == GIB


def test_gpt_oss_120b_is_cached_on_24_gb() -> None:
    """Seven times what a token chooses is in slots; all experts fit into 64 GiB of host memory."""
    model = MODELS["gpt_oss 120b"]
    free = int(24 * 0.99 * GIB - DRIVER_BYTES - model.dense)
    shares = divide(free, step_bytes(model.step()), model.experts, SEQS * model.positions * model.token)
    slots = shares.experts // GPT_OSS_EXPERT
    assert 8 * 36 * 4 > slots > 7 * 36 * 4 - 36
    assert model.experts + 7 * GIB < 64 * GIB


def test_a_step_that_does_not_fit_leaves_nothing() -> None:
    shares = divide(free=GIB, step=2 * GIB, experts=GIB, pages=GIB)
    assert (shares.experts, shares.pages) == (0, 0)
