"""Our routing kernel in the place of each family's router: the same experts and weights as transformers' code."""

from __future__ import annotations

import inspect

import pytest
import torch

from moe_serve.hf import device_routers, family
from moe_serve.hf.device_routers import DeviceRouter
from moe_serve.hf.experts import ExpertsProxy
from moe_serve.hf.routings import unknown

from ...families.tiny_checkpoints import random_model
from ...families.tiny_configs import CASES

OWN = [
    name
    for name, case in CASES.items()
    if family.find(case.config().model_type.removesuffix("_thinker")).same_as is None
]
"""Without those that run as another family's modules, whose routers are tested here."""


@pytest.mark.spanning
@pytest.mark.parametrize("case", OWN)
@torch.inference_mode()
def test_chooses_as_the_family_does(device: torch.device, case: str) -> None:
    config = CASES[case].config()
    found = family.find(config.model_type)
    model = random_model(CASES[case]).to(device)
    for block in list(model.modules()):
        if type(getattr(block, "experts", None)).__name__ == found.experts_class:
            block.experts = ExpertsProxy(config)
    names = ("num_local_experts", "num_experts", "moe_num_experts")
    num_experts = next(getattr(config, name) for name in names if hasattr(config, name))
    device_routers.install(model, found.routing(config), num_experts)
    routers = [module for module in model.modules() if isinstance(module, DeviceRouter)]
    assert (not routers) == (found.routing is unknown)
    for module in routers:
        hidden = torch.randn(5, config.hidden_size, device=device)
        logits, weights, ids = module(hidden)
        expected_logits, expected_weights, expected_ids = module.router(hidden, *given_by_block(module))
        torch.testing.assert_close(logits, expected_logits.to(logits.dtype))
        order, expected_order = ids.argsort(1), expected_ids.argsort(1)
        assert torch.equal(ids.gather(1, order), expected_ids.gather(1, expected_order))
        torch.testing.assert_close(weights.gather(1, order), expected_weights.gather(1, expected_order).float())


def given_by_block(module: DeviceRouter) -> tuple[torch.Tensor, ...]:
    """The correction, where the router's `forward` takes it from its block."""
    asked = "e_score_correction_bias" in inspect.signature(module.router.forward).parameters
    return (module._correction,) if asked and module._correction is not None else ()
