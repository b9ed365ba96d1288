"""Scheme: how config.json's `quantization_config` says a checkpoint's matrices are stored.

One function per method. What the matrices look like is Encoding's business; here are the field names of
compressed-tensors, ModelOpt, GPTQ, AWQ, fine-grained fp8 (DeepSeek-V3, Qwen3) and MXFP4 (GPT-OSS). Reads no tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from expert_cache.storage.encoding import Encoding
from moe_serve.errors import UnsupportedModelError
from moe_serve_kernels.quantized import Kind

Fields = Mapping[str, Any]

SCALED_WEIGHT = {".weight": "codes", ".weight_scale": "scale"}
PACKED_WEIGHT = {".weight_packed": "codes", ".weight_scale": "scale", ".weight_zero_point": "zero"}
NVFP4_GROUP = 16
FOUR_BIT_FLOATS = {"nvfp4-pack-quantized": NVFP4_GROUP, "mxfp4-pack-quantized": 32}
"""compressed-tensors' format -> columns of a group."""
COLUMN_WORDS = {".qweight": "codes", ".scales": "scale", ".qzeros": "zero"}


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
    rounds_activations: bool = False
    """Made for engines that quantise activations too; we do not."""

    def encoding_of(self, dtype: torch.dtype) -> Encoding:
        """Of a matrix, by the type of its codes."""
        return self.by_dtype.get(dtype, self.encoding)

    def split(self, name: str) -> tuple[str, str] | None:
        """(name the matrix would have unquantised, role), or None for a tensor of no quantised matrix."""
        for suffix, role in self.suffixes.items():
            if name.endswith(suffix):
                return name.removesuffix(suffix) + self.stem, role
        return None


def scheme_of(fields: Fields, dtype: torch.dtype, where: str) -> Scheme:
    """The Scheme of a `quantization_config`; UnsupportedModelError names the field that we cannot follow.

    `dtype` of the checkpoint's other tensors; `where`: the config file's path.
    """
    method = str(fields.get("quant_method"))
    if method not in METHODS:
        raise _unsupported(where, "quant_method", method, f"one of {', '.join(METHODS)}")
    refuse_unknown(fields, KNOWN[method], where)
    return METHODS[method](fields, dtype if dtype == torch.bfloat16 else torch.float32, where)


def modelopt_scheme(note: Fields, dtype: torch.dtype, where: str) -> Scheme:
    """The Scheme of ModelOpt's hf_quant_config.json. Arguments as in `scheme_of`."""
    fields = note.get("quantization")
    if not isinstance(fields, Mapping):
        raise UnsupportedModelError(f"{where}: quantization is {fields!r}; needs an object")
    refuse_unknown(fields, MODELOPT_NOTE, where)
    return _modelopt(fields, dtype if dtype == torch.bfloat16 else torch.float32, where, "quantization")


def refuse_unknown(fields: Fields, known: Collection[str], where: str) -> None:
    """UnsupportedModelError names a field that is set and might change the arithmetic."""
    for name, value in fields.items():
        if name not in known and value:
            raise UnsupportedModelError(
                f"{where}: the quantisation's {name} is {value!r}, which moe-serve does not follow; use a checkpoint"
                " without it"
            )


def _unsupported(where: str, field: str, value: object, supported: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{where}: quantization_config.{field} is {value!r}; moe-serve reads {supported}. Use such a checkpoint,"
        " or a bf16 one and `moe-serve quantize`"
    )


def _expect(where: str, field: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if value not in allowed:
        raise _unsupported(where, field, value, " or ".join(map(repr, allowed)))
    return value


def _compressed_tensors(fields: Fields, float_dtype: torch.dtype, where: str) -> Scheme:
    sparse = (fields.get("sparsity_config") or {}).get("format", "dense")
    _expect(where, "sparsity_config.format", sparse, ("dense",))
    groups = fields.get("config_groups") or {}
    if len(groups) != 1:
        raise _unsupported(where, "config_groups", sorted(groups), "exactly one group")
    name, group = next(iter(groups.items()))
    at = f"config_groups.{name}"
    weights = group.get("weights") or {}
    refuse_unknown(group, GROUP, f"{where}: {at}")
    refuse_unknown(weights, WEIGHTS, f"{where}: {at}.weights")
    known = ("pack-quantized", "int-quantized", "float-quantized", *FOUR_BIT_FLOATS)
    layout = _expect(where, "format", fields.get("format"), known)
    bits = weights.get("num_bits")
    if layout in FOUR_BIT_FLOATS:
        return _four_bit_floats(weights, group.get("input_activations") is not None, FOUR_BIT_FLOATS[layout], where, at)
    if layout == "pack-quantized":
        _expect(where, f"{at}.weights.type", weights.get("type"), ("int",))
        bits = _expect(where, f"{at}.weights.num_bits", bits, (4, 8))
        kind: Kind = "int4" if bits == 4 else "uint8"
        encoding = Encoding(
            "packed", kind, zero=1 << (bits - 1), float_dtype=float_dtype, **_strategy(weights, where, at)
        )
        return Scheme(encoding, {**PACKED_WEIGHT, ".weight_g_idx": "order"})
    _expect(where, f"{at}.weights.num_bits", bits, (8,))
    _expect(where, f"{at}.weights.symmetric", weights.get("symmetric"), (True,))
    kind = "int8" if layout == "int-quantized" else "fp8"
    encoding = Encoding("rows", kind, float_dtype=float_dtype, **_strategy(weights, where, at))
    return Scheme(
        encoding,
        SCALED_WEIGHT,
        unused=(*Scheme(encoding, {}).unused, ".weight_zero_point"),
        rounds_activations=group.get("input_activations") is not None,
    )


def _four_bit_floats(weights: Fields, rounds_activations: bool, size: int, where: str, at: str) -> Scheme:
    """compressed-tensors' NVFP4 (e4m3 scales, divided by one factor per matrix) and MXFP4 (e8m0 scales)."""
    _expect(where, f"{at}.weights.num_bits", weights.get("num_bits"), (4,))
    _expect(where, f"{at}.weights.type", weights.get("type"), ("float",))
    _expect(where, f"{at}.weights.group_size", weights.get("group_size"), (size,))
    encoding = Encoding("rows", "fp4", group=size, divides=True)
    suffixes = {".weight_packed": "codes", ".weight_scale": "scale", ".weight_global_scale": "factor"}
    return Scheme(encoding, suffixes, rounds_activations=rounds_activations)


def _strategy(weights: Fields, where: str, at: str) -> dict[str, Any]:
    strategy = _expect(
        where, f"{at}.weights.strategy", weights.get("strategy"), ("channel", "group", "tensor", "block")
    )
    if strategy == "group":
        return {"group": int(weights["group_size"])}
    if strategy == "block":
        rows, columns = weights["block_structure"]
        return {"rows_per_scale": int(rows), "group": int(columns)}
    return {"rows_per_scale": 0 if strategy == "tensor" else 1}


def _gptq(fields: Fields, float_dtype: torch.dtype, where: str) -> Scheme:
    bits = _expect(where, "bits", fields.get("bits"), (4, 8))
    _expect(where, "pack_dtype", fields.get("pack_dtype") or "int32", ("int32",))
    form = _expect(where, "checkpoint_format", fields.get("checkpoint_format") or "gptq", ("gptq", "gptq_v2"))
    encoding = Encoding(
        "gptq",
        "int4" if bits == 4 else "uint8",
        group=max(int(fields.get("group_size", -1)), 0),
        zero=1 << (bits - 1),
        zero_step=1 if form == "gptq" else 0,
        float_dtype=float_dtype,
    )
    # Without act-order the columns are in the order of their groups, and g_idx says nothing new.
    suffixes = {**COLUMN_WORDS, ".g_idx": "order"} if fields.get("desc_act") else dict(COLUMN_WORDS)
    if fields.get("sym", True):  # the zero point is known, and the two formats are confused in the wild
        suffixes.pop(".qzeros")
    return Scheme(encoding, suffixes, unused=(".qzeros", ".g_idx"))


def _awq(fields: Fields, float_dtype: torch.dtype, where: str) -> Scheme:
    bits = fields["bits"] if "bits" in fields else fields.get("w_bit")
    _expect(where, "bits", bits, (4,))
    _expect(where, "version", str(fields.get("version", "gemm")).lower(), ("gemm",))
    size = int(fields.get("group_size", fields.get("q_group_size", 128)))
    return Scheme(Encoding("awq", "int4", group=max(size, 0), zero=8, float_dtype=float_dtype), COLUMN_WORDS)


def _fp8(fields: Fields, float_dtype: torch.dtype, where: str) -> Scheme:
    _expect(where, "fmt", fields.get("fmt", "e4m3"), ("e4m3", "float8_e4m3fn"))
    block = fields.get("weight_block_size")
    if not block:
        encoding = Encoding("rows", "fp8", rows_per_scale=0, float_dtype=float_dtype)
        return Scheme(encoding, {**SCALED_WEIGHT, ".weight_scale_inv": "scale"}, rounds_activations=True)
    rows, columns = (int(size) for size in block)
    encoding = Encoding("rows", "fp8", group=columns, rows_per_scale=rows, float_dtype=float_dtype)
    return Scheme(encoding, {".weight": "codes", ".weight_scale_inv": "scale"}, rounds_activations=True)


def _list_of(names: Collection[object]) -> str:
    return f" of {', '.join(sorted(map(str, names)))}" if names else ""


def _modelopt(fields: Fields, float_dtype: torch.dtype, where: str, at: str = "quantization_config") -> Scheme:
    """ModelOpt's NVFP4 in groups of 16, fp8 with one scale per matrix, or both, told apart by the codes' type."""
    algorithm, layers = fields.get("quant_algo"), fields.get("quantized_layers") or {}
    of_layers = (
        {layer.get("quant_algo") for layer in layers.values()} if algorithm == "MIXED_PRECISION" else {algorithm}
    )
    if not of_layers or not of_layers <= {"NVFP4", "FP8"}:
        raise UnsupportedModelError(
            f"{where}: {at}.quant_algo is {algorithm!r}{_list_of(of_layers - {algorithm})}; moe-serve reads 'NVFP4' and"
            " 'FP8', and MIXED_PRECISION of both"
        )
    _expect(where, "group_size", fields.get("group_size") or NVFP4_GROUP, (NVFP4_GROUP,))
    eight_bits = Encoding("rows", "fp8", rows_per_scale=0, float_dtype=float_dtype)
    if algorithm == "FP8":
        return Scheme(eight_bits, SCALED_WEIGHT, rounds_activations=True)
    four_bits = Encoding("rows", "fp4", group=NVFP4_GROUP, float_dtype=float_dtype)
    suffixes = {**SCALED_WEIGHT, ".weight_scale_2": "factor"}
    return Scheme(four_bits, suffixes, by_dtype={torch.float8_e4m3fn: eight_bits}, rounds_activations=True)


def _mxfp4(fields: Fields, float_dtype: torch.dtype, where: str) -> Scheme:
    encoding = Encoding("blocks", "fp4", group=32, float_dtype=float_dtype)
    return Scheme(encoding, {"_blocks": "codes", "_scales": "scale"}, stem="")


METHODS: Mapping[str, Callable[[Fields, torch.dtype, str], Scheme]] = {
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "modelopt": _modelopt,
}
"""By quant_method."""

MODELOPT_NOTE = {"quant_algo", "kv_cache_quant_algo", "exclude_modules", "group_size", "quantized_layers"}
"""Of hf_quant_config.json; caches stay floats here."""
COMMON = {"quant_method", "modules_to_not_convert", "ignored_layers", "ignore", "backend", "version", "meta"}
"""Fields of several methods: which modules stay floats is seen from their tensors."""
GROUP = {"targets", "weights", "input_activations", "output_activations", "format"}
"""Of a group of compressed-tensors."""
WEIGHTS = {
    *("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder"),
    *("observer", "observer_kwargs", "scale_dtype", "zp_dtype"),
}
"""Of a group's weights."""
KNOWN: Mapping[str, Collection[str]] = {
    "compressed-tensors": {
        *COMMON,
        *("format", "quantization_status", "config_groups", "kv_cache_scheme", "sparsity_config"),
        *("global_compression_ratio", "run_compressed"),
    },
    "gptq": {
        *COMMON,
        *("bits", "group_size", "desc_act", "sym", "checkpoint_format", "format", "lm_head", "pack_dtype"),
        *("true_sequential", "static_groups", "damp_percent", "damp_auto_increment", "mse", "v2", "quantizer"),
        *("model_name_or_path", "model_file_base_name", "dataset", "tokenizer", "batch_size", "pad_token_id"),
        *("use_cuda_fp16", "use_exllama", "disable_exllama", "exllama_config", "max_input_length", "model_seqlen"),
        *("cache_block_outputs", "modules_in_block_to_quantize", "module_name_preceding_first_block"),
        *("block_name_to_quantize", "act_sort"),
    },
    "awq": {
        *COMMON,
        *("bits", "w_bit", "group_size", "q_group_size", "zero_point", "exllama_config", "do_fuse"),
        *("modules_to_fuse", "fuse_max_seq_len", "lm_head"),
    },
    "fp8": {*COMMON, "fmt", "weight_block_size", "activation_scheme", "scale_fmt", "kv_cache_scheme"},
    "mxfp4": {*COMMON, "dequantize"},
    "modelopt": {
        *COMMON,
        *("quant_algo", "group_size", "config_groups", "quantized_layers", "kv_cache_scheme", "kv_cache_quant_algo"),
        *("producer", "exclude_modules"),
    },
}
"""By quant_method: what is read here, and what tools write down of how the codes were found."""
