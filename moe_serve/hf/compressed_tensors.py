"""compressed-tensors' `quantization_config` as a Scheme: formats, groups of modules, strategies. Reads no tensors."""

from __future__ import annotations

import re
from typing import Any

import torch

from expert_cache.storage.encoding import Encoding
from moe_serve.hf.quantization_fields import Fields
from moe_serve.hf.scheme import SCALED_WEIGHT, Scheme, promises
from moe_serve_kernels.quantized import Kind

PACKED_WEIGHT = {".weight_packed": "codes", ".weight_scale": "scale", ".weight_zero_point": "zero"}
NVFP4_GROUP = 16
FOUR_BIT_FLOATS = {"nvfp4-pack-quantized": NVFP4_GROUP, "mxfp4-pack-quantized": 32}
"""compressed-tensors' format -> columns of a group."""
MXFP8 = "mxfp8-quantized"
LAYOUTS = ("pack-quantized", "int-quantized", "float-quantized", MXFP8, *FOUR_BIT_FLOATS)
MIXED = "mixed-precision"
"""The format of a checkpoint whose groups have formats of their own."""
MXFP8_GROUP = 32
GROUP = {"targets", "weights", "input_activations", "output_activations", "format"}
"""Of a group of compressed-tensors."""
WEIGHTS = {
    *("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder"),
    *("observer", "observer_kwargs", "scale_dtype", "zp_dtype"),
}
"""Of a group's weights."""
ANY = re.compile("")
"""Matches every module: all that are quantised are of class Linear."""


def compressed_tensors(fields: Fields, float_dtype: torch.dtype) -> Scheme:
    fields.object("sparsity_config").choice("format", ("dense",), "dense")
    layout, groups = fields.choice("format", (*LAYOUTS, MIXED)), _groups(fields)
    if not groups or (layout not in ("pack-quantized", MIXED) and len(groups) > 1):
        raise fields.unsupported("config_groups", f"exactly one group, or several of format pack-quantized or {MIXED}")
    if len(groups) == 1 and layout != MIXED:
        return _of_layout(layout, groups[0], float_dtype)
    return _several_groups([(_layout_of(group, layout), group) for group in groups], float_dtype)


def _layout_of(group: Fields, layout: str) -> str:
    """A group's own format, in a checkpoint of several."""
    return str(group.choice("format", LAYOUTS)) if layout == MIXED else layout


def _of_layout(layout: str, group: Fields, float_dtype: torch.dtype) -> Scheme:
    """One group alone."""
    weights = group.object("weights")
    if layout in FOUR_BIT_FLOATS:
        return _four_bit_floats(weights, group.has("input_activations"), FOUR_BIT_FLOATS[layout])
    if layout == "pack-quantized":
        promised = promises(
            zero=None if weights.flag("symmetric", default=True) else weights.says("symmetric"),
            order=weights.says("actorder") if weights.get("actorder") in ("group", "dynamic", True) else None,
        )
        suffixes = {**PACKED_WEIGHT, ".weight_g_idx": "order"}
        return Scheme(_packed(weights, float_dtype), suffixes, promised=promised)
    return _eight_bits(layout, weights, group.has("input_activations"), float_dtype)


def _eight_bits(layout: str, weights: Fields, rounds_activations: bool, float_dtype: torch.dtype) -> Scheme:
    """A byte per value: int8, fp8, or MXFP8 (e8m0 scales)."""
    if layout == MXFP8:
        weights.choice("strategy", ("group",))
        weights.choice("group_size", (MXFP8_GROUP,))
    weights.choice("type", ("int",) if layout == "int-quantized" else ("float",))
    weights.choice("num_bits", (8,))
    weights.choice("symmetric", (True,))
    encoding = Encoding(
        "rows", "int8" if layout == "int-quantized" else "fp8", float_dtype=float_dtype, **_strategy(weights)
    )
    return Scheme(
        encoding,
        SCALED_WEIGHT,
        unused=(*Scheme(encoding, {}).unused, ".weight_zero_point"),
        rounds_activations=rounds_activations,
        all_zero=".weight_zero_point",
        symmetric_field=weights.says("symmetric"),
    )


def _groups(fields: Fields) -> list[Fields]:
    """By the order of their names."""
    groups = fields.object("config_groups")
    found = [groups.object(name) for name in groups.names()]
    for group in found:
        group.refuse_unknown(GROUP)
        group.object("weights").refuse_unknown(WEIGHTS)
    return found


def _packed(weights: Fields, float_dtype: torch.dtype) -> Encoding:
    weights.choice("type", ("int",))
    bits = weights.choice("num_bits", (4, 8))
    kind: Kind = "int4" if bits == 4 else "uint8"
    return Encoding("packed", kind, zero=1 << (bits - 1), float_dtype=float_dtype, **_strategy(weights))


def _several_groups(groups: list[tuple[str, Fields]], float_dtype: torch.dtype) -> Scheme:
    """Symmetric codes of other bits, formats or groups of columns in some modules; each group has its layout."""
    found: list[tuple[re.Pattern[str], Encoding]] = []
    suffixes: dict[str, str] = {}
    rounds = False
    for layout, group in groups:
        weights = group.object("weights")
        weights.choice("symmetric", (True,), True)
        weights.choice("actorder", (None, "static", "weight"))
        scheme = _of_layout(layout, group, float_dtype)
        found += [(target, scheme.encoding) for target in _targets(group)]
        suffixes |= {end: role for end, role in scheme.suffixes.items() if role != "order"}
        rounds = rounds or scheme.rounds_activations
    found.sort(key=lambda each: each[0] is ANY)  # a module's name counts for more than its class
    return Scheme(found[0][1], suffixes, by_target=tuple(found), rounds_activations=rounds)


def _targets(group: Fields) -> list[re.Pattern[str]]:
    targets = group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(each, str) for each in targets):
        raise group.unsupported("targets", "lists of names, of patterns that begin with re:, and Linear")
    try:
        return [_target(each) for each in targets]
    except (re.error, RecursionError, OverflowError) as error:
        raise group.unsupported("targets", f"patterns that Python's re compiles ({error})") from error


def _target(text: str) -> re.Pattern[str]:
    """re.error for a pattern that is none."""
    if text == "Linear":
        return ANY
    return re.compile(text.removeprefix("re:") if text.startswith("re:") else f"{re.escape(text)}$")


def _four_bit_floats(weights: Fields, rounds_activations: bool, size: int) -> Scheme:
    """compressed-tensors' NVFP4 (e4m3 scales, divided by one factor per matrix) and MXFP4 (e8m0 scales)."""
    weights.choice("num_bits", (4,))
    weights.choice("type", ("float",))
    weights.choice("group_size", (size,))
    encoding = Encoding("rows", "fp4", group=size, divides=True)
    suffixes = {".weight_packed": "codes", ".weight_scale": "scale", ".weight_global_scale": "factor"}
    return Scheme(encoding, suffixes, rounds_activations=rounds_activations)


def _strategy(weights: Fields) -> dict[str, Any]:
    strategy = weights.choice("strategy", ("channel", "group", "tensor", "block"))
    if strategy == "group":
        return {"group": weights.integer("group_size", 1)}
    if strategy == "block":
        rows, columns = weights.pair("block_structure")
        return {"rows_per_scale": rows, "group": columns}
    return {"rows_per_scale": 0 if strategy == "tensor" else 1}
