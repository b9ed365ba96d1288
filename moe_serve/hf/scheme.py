"""Scheme: how one checkpoint stores its quantised matrices, whichever method's config says so. Reads no tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from expert_cache.storage.encoding import Encoding

SCALED_WEIGHT = {".weight": "codes", ".weight_scale": "scale"}


@dataclass(frozen=True, slots=True)
class Scheme:
    """One checkpoint's way to store quantised matrices."""

    encoding: Encoding
    suffixes: Mapping[str, str]
    """End of a tensor's name -> its role (expert_cache.storage.encoding.ROLES)."""
    unused: tuple[str, ...] = (".weight_shape", ".input_scale", ".k_scale", ".v_scale", ".input_global_scale")
    """Ends of names of what we do without."""
    stem: str = ".weight"
    """What the matrix's name would end in, were it not quantised."""
    by_dtype: Mapping[torch.dtype, Encoding] = field(default_factory=dict)
    """Encodings of matrices whose codes have another type than most, in checkpoints of several formats."""
    by_target: tuple[tuple[re.Pattern[str], Encoding], ...] = ()
    """Encodings of modules whose names match, the first match first, in checkpoints of several groups."""
    rounds_activations: bool = False
    """Made for engines that quantise activations too; we do not."""
    is_symmetric: bool = False
    """Zero points are half of what the codes can say, whatever the form that stores them."""
    promised: Mapping[str, str] = field(default_factory=dict)
    """Role that every matrix must have -> the field that says so, in words."""
    all_zero: str = ""
    """End of the names of zero points that are not read, since `symmetric_field` says that all are zero."""
    symmetric_field: str = ""
    """The field and its value, in words."""

    def encoding_of(self, dtype: torch.dtype, name: str) -> Encoding:
        """Of a matrix, by the type of its codes and the name that it would have unquantised."""
        module = name.removesuffix(".weight")
        found = (encoding for target, encoding in self.by_target if target.match(module))
        return next(found, self.by_dtype.get(dtype, self.encoding))

    def split(self, name: str) -> tuple[str, str] | None:
        """(name the matrix would have unquantised, role), or None for a tensor of no quantised matrix."""
        for suffix, role in self.suffixes.items():
            if name.endswith(suffix):
                return name.removesuffix(suffix) + self.stem, role
        return None


def promises(**fields: str | None) -> dict[str, str]:
    """By role: the field that promises its tensor, in words; None where none does."""
    return {role: text for role, text in fields.items() if text is not None}
