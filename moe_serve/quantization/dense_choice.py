"""Which weights outside the experts are quantised, and how, where `moe-serve quantize --dense` asks for it.

Linear layers of attention, shared experts and dense MLPs, and the output layer. Embeddings, routers and norms stay as
they are, as in llama.cpp's files. Knows names and shapes; rounds nothing.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from moe_serve.hf.composites import OTHER_TOWERS
from moe_serve.hf.family import FURTHER, Family
from moe_serve.hf.leftovers import layer_of
from moe_serve.hf.stand_ins import MULTIPLIED_BY_OTHERS

LINEAR = re.compile(r"(?:^|\.)(?P<module>lm_head|kv_a_proj_with_mqa|\w+_proj)\.weight$")
EXPERTS = r"re:.*\.experts\.\d+\."
"""Modules that compressed-tensors' groups name: the experts', and all others."""
OTHERS = r"re:(?!.*\.experts\.\d+\.)"


class Precision(NamedTuple):
    """How finely weights are rounded."""

    bits: int
    group: int
    """Columns that share a scale; 0: one scale per row."""


DENSE = {"int8": Precision(8, 0), "int4": Precision(4, 128)}
"""By the value of --dense."""


class DenseChoice:
    """One checkpoint's."""

    def __init__(self, config: Any, family: Family, precision: Precision | None) -> None:
        """`precision` None: nothing is quantised."""
        self.num_layers: int = config.num_hidden_layers
        self._floats = (*family.widened, *MULTIPLIED_BY_OTHERS)
        self._precision = precision

    def of(self, name: str, shape: tuple[int, ...]) -> Precision | None:
        """Of a tensor that is no expert's; None where it stays as it is."""
        if self._precision is None or not self.is_linear(name, shape):
            return None
        is_cut = self._precision.group and shape[1] % self._precision.group
        return None if is_cut else self._precision

    def is_linear(self, name: str, shape: tuple[int, ...]) -> bool:
        """A linear layer's weight that kernels read in any format, unless it is an expert's."""
        found = LINEAR.search(name)
        if found is None or len(shape) != 2 or found["module"] in self._floats:
            return False
        is_foreign = OTHER_TOWERS.search(name) or FURTHER.search(name)
        return not is_foreign and layer_of(name, -1) < self.num_layers
