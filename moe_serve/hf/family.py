"""Family: what we must know about one Hugging Face MoE architecture to take over its experts.

One file per family in moe_serve/hf/families/, or one entry point of a package from outside: see that folder's
`__init__.py`. Attention, norms, router and everything else stay Hugging Face's own code; a family only
says which class holds the experts, how their tensors are named, and what happens between the two
matrix products. Knows no tensors and loads nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from moe_serve.errors import UnsupportedModelError
from moe_serve.hf.activations import ActivationOf, gated
from moe_serve.hf.families import FAMILIES, refuse_unknown_family
from moe_serve.hf.recurrent import Recurrence
from moe_serve.hf.routings import RoutingOf, unknown
from moe_serve_base.extensions import ExtensionError
from moe_serve_kernels.cpu.decoder import Rotary

PART_OF = {
    "w1": "gate",
    "w3": "up",
    "w2": "down",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "gate_up_proj": "gate_up",
    "input_linear": "gate_up",
    "output_linear": "down",
    "fc1": "gate_up",
    "fc2": "down",
    "gate_up_proj_bias": "gate_up_bias",
    "down_proj_bias": "down_bias",
}
"""Name in the checkpoint -> what it is. gate_up holds gate and up one after the other."""

PER_EXPERT = re.compile(
    r"layers\.(?P<layer>\d+)\.(?:mlp|block_sparse_moe)\.experts\.(?P<expert>\d+)\."
    r"(?P<part>w[123]|gate_proj|up_proj|down_proj)\.weight$"
)
"""One 2-D tensor per expert and matrix, [out, in]."""

FUSED = re.compile(
    r"layers\.(?P<layer>\d+)\.(?:mlp|block_sparse_moe)\.experts\."
    r"(?P<part>gate_up_proj|down_proj|gate_up_proj_bias|down_proj_bias)$"
)
"""One 3-D tensor per layer and matrix, [E, out, in] (or [E, in, out] where Family.transposed)."""

Adapt = Callable[[nn.Module, Any], None]
FAMILY_NAME = "moe_serve_family"
"""Attribute of a config whose checkpoint names another model_type than transformers does."""


FURTHER = re.compile(r"(^|\.)(mtp|nextn)[._]")
"""In the names of layers that predict several tokens at once, where these have a count of their own (`mtp.layers.0`).
Only their owners' engines run them."""


@dataclass(frozen=True, slots=True)
class Family:
    """How one architecture stores and applies its experts."""

    experts_class: str
    """Name of the transformers class that our ExpertsProxy replaces."""
    patterns: tuple[re.Pattern[str], ...] = (PER_EXPERT, FUSED)
    """Checkpoint names of expert tensors, with groups layer, part and (per-expert layout) expert."""
    transposed: bool | None = False
    """Fused tensors are [E, in, out]; None: in some checkpoints, and their shapes tell."""
    interleaved: bool = False
    """gate_up alternates gate and up columns instead of stacking them."""
    has_gate: bool = True
    """False: experts have no gate matrix. Their up matrix counts as both, so that relu gives relu(x) * x."""
    activation: ActivationOf = field(default=gated)
    """Made from the HF config: what joins gate and up into the down projection's input."""
    routing: RoutingOf = field(default=unknown)
    """Made from the HF config: how the router chooses, for our kernel; the default leaves the family's own router."""
    plain_layers: bool = False
    """Norms, attention and MLPs are where hf/decoder_blocks.py looks for them, and there is nothing else: a kernel can
    run a whole decoding step."""
    rotary: Rotary = "halves"
    """Which values of a head rotary embeddings rotate against each other."""
    same_as: str | None = None
    """The model_type under which transformers knows this family, where checkpoints name another."""
    sets: Mapping[str, Any] = field(default_factory=dict)
    """Fields of that model_type's config that this family fixes and does not write down."""
    recurrence: Recurrence | None = None
    """Which layers keep a state of fixed size per sequence, beside or instead of keys and values."""
    model_class: str | None = None
    """Name of the text model's causal class in transformers, where AutoModelForCausalLM does not know it."""
    adapt: Adapt | None = None
    """Called with the loaded model and its config, where modules take for granted what is not so here: that a batch's
    tokens are one sequence, or that experts lie in the block. UnsupportedModelError."""
    widened: tuple[str, ...] = ()
    """Names of linear layers whose weights a module reads itself: float32 where the others stay bf16 in memory."""
    masks_by_config_window: bool = False
    """The sliding window is in the config only and never passed to the attention function."""

    tabulates_rotary: bool = False
    """Its rotary embedding computes on the CPU in every step: on a GPU a table takes its place (hf/rope.py)."""

    def match(self, tensor_name: str) -> re.Match[str] | None:
        """The match of an expert tensor's name, or None for a dense one."""
        if FURTHER.search(tensor_name):
            return None
        return next((m for p in self.patterns if (m := p.search(tensor_name))), None)


def family_of(config: Any) -> Family:
    """The Family of a config that `read_config` returned."""
    return find(getattr(config, FAMILY_NAME, config.model_type))


def find(model_type: str) -> Family:
    """The Family of config.json's `model_type`, or of the text model's in it; UnsupportedModelError lists the supported
    ones."""
    name = refuse_unknown_family({"model_type": model_type})
    try:
        family: Family = FAMILIES.find(name)
    except ExtensionError as error:
        raise UnsupportedModelError(str(error)) from error
    return family
