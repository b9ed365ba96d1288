"""A checkpoint's sizes from config.json alone, before any of its weights are here.

The dense part is counted on a model without weights. What a matrix takes follows from its shape and from how the
checkpoint is quantised.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from expert_cache.storage.encoding import Encoding
from moe_serve.doctor.fit import Sizes
from moe_serve.execution.kv_cache import bytes_per_token
from moe_serve.execution.state_cache import bytes_per_sequence
from moe_serve.hf.config_file import read_config, scheme_in
from moe_serve.hf.dense_loading import empty_model
from moe_serve.hf.experts import find_experts
from moe_serve.hf.family import family_of
from moe_serve.hf.loading import shapes_of
from moe_serve.hf.scheme import Scheme
from moe_serve.spec import ModelSpec
from moe_serve_kernels.quantized import BITS

NOT_QUANTIZED = ("modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules")
"""Fields of a quantization_config."""
ALWAYS_FLOAT = re.compile(r"embed|lm_head|(^|\.)(gate|router)\.|norm")
WORD_BYTES = 4
"""Of what holds several codes: zero points, and of an index of columns."""


def sizes_from_config(folder: str, dtype: torch.dtype) -> Sizes:
    """Sizes of the checkpoint whose config.json is in `folder`, computed in `dtype`. CheckpointError as in loading."""
    hf_config = read_config(folder)
    spec = ModelSpec.from_hf(hf_config)
    scheme, model = scheme_in(folder, hf_config), empty_model(hf_config)
    kv_shapes, state_shapes = shapes_of(hf_config)
    return Sizes(
        dense_bytes=_dense_bytes(model, spec.dtype, scheme, _left_as_floats(hf_config)),
        expert_bytes=_expert_bytes(spec, scheme, family_of(hf_config).has_gate),
        num_layers=len(find_experts(model)),
        num_experts=spec.num_experts,
        top_k=spec.top_k,
        kv_bytes_per_token=bytes_per_token(kv_shapes, dtype),
        context=spec.max_position_embeddings,
        state_bytes_per_sequence=bytes_per_sequence(state_shapes),
    )


def further_bytes(folder: str, sizes: Sizes) -> int:
    """Of the layers behind the model's own, which predict several tokens at once (MTP) and are not served.

    Each is counted as one more layer, with embeddings and a head of its own, as DeepSeek-V3 and GLM-4.5 store them.
    """
    hf_config = read_config(folder)
    spec, count = ModelSpec.from_hf(hf_config), getattr(hf_config, "num_nextn_predict_layers", None) or 0
    tables = 2 * spec.vocab_size * spec.hidden_size * spec.dtype.itemsize
    layer = (sizes.dense_bytes - tables) // spec.num_layers + sizes.expert_bytes * sizes.num_experts
    return int(count * (layer + tables + 2 * spec.hidden_size**2 * spec.dtype.itemsize))


def _dense_bytes(model: nn.Module, dtype: torch.dtype, scheme: Scheme | None, floats: Collection[str]) -> int:
    """Of all parameters of a model without experts; `floats`: patterns of names of what is not quantised."""
    total = 0
    for name, parameter in model.named_parameters():
        encoding = None
        if scheme is not None and parameter.dim() == 2 and not _is_float(name, floats):
            encoding = scheme.encoding
        rows, columns = parameter.shape if parameter.dim() == 2 else (1, parameter.numel())
        total += _matrix_bytes(rows, columns, dtype, encoding)
    return total


def _left_as_floats(hf_config: Any) -> tuple[str, ...]:
    """The patterns in a quantization_config that name what it leaves alone."""
    fields = getattr(hf_config, "quantization_config", None) or {}
    found = (fields.get(name) or () for name in NOT_QUANTIZED) if isinstance(fields, dict) else ()
    return tuple(pattern for patterns in found for pattern in patterns)


def _is_float(name: str, patterns: Collection[str]) -> bool:
    """A table of embeddings, a router, or what one of the patterns names: a part of the name, with * or after `re:`."""
    if ALWAYS_FLOAT.search(name):
        return True
    module = name.removesuffix(".weight")
    return any(
        re.match(pattern[3:], module)
        if pattern.startswith("re:")
        else fnmatch.fnmatch(module, f"*{pattern}*") or pattern == module.split(".")[-1]
        for pattern in patterns
    )


def _expert_bytes(spec: ModelSpec, scheme: Scheme | None, has_gate: bool) -> int:
    """Of one expert as the checkpoint stores it."""
    inner, outer = spec.expert_intermediate_size, spec.expert_hidden_size
    up, down = (
        _matrix_bytes(rows, columns, spec.dtype, scheme.encoding if scheme else None)
        for rows, columns in ((inner, outer), (outer, inner))
    )
    return up * (2 if has_gate else 1) + down


def _matrix_bytes(rows: int, columns: int, dtype: torch.dtype, encoding: Encoding | None) -> int:
    """Of a matrix of floats, or of its codes and scales."""
    if encoding is None:
        return rows * columns * dtype.itemsize
    shapes = encoding.shapes(rows, columns)
    sizes = {role: math.prod(shape) for role, shape in shapes.items()}
    codes = -(-rows * columns * BITS[encoding.kind] // 8)
    if encoding.layout in ("gptq", "awq"):
        order = sizes.get("order", 0) * WORD_BYTES
        return codes + sizes["scale"] * torch.float16.itemsize + sizes["zero"] * WORD_BYTES + order
    return codes + sizes["scale"] * _scale_bytes(encoding)


def _scale_bytes(encoding: Encoding) -> int:
    """Of one scale: a byte for 4-bit floats, float32 for blocks of fp8, else a float of 16 bits."""
    if encoding.kind == "fp4":
        return 1
    return 4 if encoding.kind == "fp8" else 2
