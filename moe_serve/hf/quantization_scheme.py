"""Scheme: how config.json's `quantization_config` says a checkpoint's matrices are stored.

One function per method. What the matrices look like is Encoding's business; here are the field names of
compressed-tensors, ModelOpt, GPTQ, AWQ, fine-grained fp8 (DeepSeek-V3, Qwen3) and MXFP4 (GPT-OSS). Reads no tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch

from expert_cache.storage.encoding import Encoding
from moe_serve.hf import auto_round
from moe_serve.hf.compressed_tensors import NVFP4_GROUP, compressed_tensors
from moe_serve.hf.quantization_fields import Fields
from moe_serve.hf.scheme import SCALED_WEIGHT, Scheme, promises

COLUMN_WORDS = {".qweight": "codes", ".scales": "scale", ".qzeros": "zero"}


def scheme_of(values: object, dtype: torch.dtype, where: str) -> Scheme:
    """The Scheme of a `quantization_config`; UnsupportedModelError names the field that we cannot follow.

    `dtype` of the checkpoint's other tensors; `where`: the config file's path.
    """
    fields = Fields(values, where)
    method = fields.choice("quant_method", tuple(METHODS))
    fields.refuse_unknown(KNOWN[method])
    return METHODS[method](fields, dtype if dtype == torch.bfloat16 else torch.float32)


def modelopt_scheme(note: object, dtype: torch.dtype, where: str) -> Scheme:
    """The Scheme of ModelOpt's hf_quant_config.json. Arguments as in `scheme_of`."""
    fields = Fields(note.get("quantization") if isinstance(note, Mapping) else note, where, "quantization")
    fields.refuse_unknown(MODELOPT_NOTE)
    return _modelopt(fields, dtype if dtype == torch.bfloat16 else torch.float32)


def _gptq(fields: Fields, float_dtype: torch.dtype) -> Scheme:
    bits = fields.choice("bits", (4, 8))
    fields.choice("pack_dtype", ("int32",), "int32")
    form = fields.choice("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    encoding = Encoding(
        "gptq",
        "int4" if bits == 4 else "uint8",
        group=_group_or_row(fields, "group_size", -1),
        zero=1 << (bits - 1),
        zero_step=1 if form == "gptq" else 0,
        float_dtype=float_dtype,
    )
    is_symmetric = fields.flag("sym", default=True)
    promised = promises(
        zero=None if is_symmetric else fields.says("sym"),
        order=fields.says("desc_act") if fields.flag("desc_act", default=False) else None,
    )
    return Scheme(encoding, {**COLUMN_WORDS, ".g_idx": "order"}, is_symmetric=is_symmetric, promised=promised)


def _group_or_row(fields: Fields, name: str, default: int) -> int:
    """Columns that share a scale; -1 in the config, and 0 here, is a whole row."""
    size = fields.integer(name, -1, default)
    if size == 0:
        raise fields.unsupported(name, "integers from 1 on, and -1")
    return max(size, 0)


def _awq(fields: Fields, float_dtype: torch.dtype) -> Scheme:
    fields.choice("bits" if fields.has("bits") else "w_bit", (4,))
    fields.choice("version", ("gemm", "GEMM"), "gemm")
    size = _group_or_row(fields, "group_size" if fields.has("group_size") else "q_group_size", 128)
    has_zeros = fields.flag("zero_point", default=True)
    return Scheme(
        Encoding("awq", "int4", group=size, zero=8, float_dtype=float_dtype),
        COLUMN_WORDS,
        promised=promises(zero=fields.says("zero_point", True) if has_zeros else None),
    )


def _auto_round(fields: Fields, float_dtype: torch.dtype) -> Scheme:
    known = auto_round.translated(fields)
    return METHODS[known.get("quant_method")](known, float_dtype)


def _fp8(fields: Fields, float_dtype: torch.dtype) -> Scheme:
    fields.choice("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    if not fields.has("weight_block_size"):
        suffixes = {**SCALED_WEIGHT, ".weight_scale_inv": "scale"}
        return Scheme(_per_matrix_fp8(float_dtype), suffixes, rounds_activations=True)
    rows, columns = fields.pair("weight_block_size")
    encoding = Encoding("rows", "fp8", group=columns, rows_per_scale=rows, float_dtype=float_dtype)
    return Scheme(encoding, {".weight": "codes", ".weight_scale_inv": "scale"}, rounds_activations=True)


def _per_matrix_fp8(float_dtype: torch.dtype) -> Encoding:
    return Encoding("rows", "fp8", rows_per_scale=0, float_dtype=float_dtype)


def _modelopt(fields: Fields, float_dtype: torch.dtype) -> Scheme:
    """ModelOpt's NVFP4 in groups of 16, fp8 with one scale per matrix, or both, told apart by the codes' type."""
    if fields.has("quantization"):
        fields = fields.object("quantization")
        fields.refuse_unknown(MODELOPT_NOTE)
    algorithm = fields.choice("quant_algo", ("NVFP4", "FP8", "MIXED_PRECISION"))
    if algorithm == "MIXED_PRECISION":
        layers = fields.object("quantized_layers")
        if not layers.names():
            raise fields.unsupported("quantized_layers", "an algorithm for each layer")
        for name in layers.names():
            layers.object(name).choice("quant_algo", ("NVFP4", "FP8"))
    fields.choice("group_size", (NVFP4_GROUP,), NVFP4_GROUP)
    eight_bits = _per_matrix_fp8(float_dtype)
    if algorithm == "FP8":
        return Scheme(eight_bits, SCALED_WEIGHT, rounds_activations=True)
    four_bits = Encoding("rows", "fp4", group=NVFP4_GROUP, float_dtype=float_dtype)
    suffixes = {**SCALED_WEIGHT, ".weight_scale_2": "factor"}
    return Scheme(four_bits, suffixes, by_dtype={torch.float8_e4m3fn: eight_bits}, rounds_activations=True)


def _mxfp4(fields: Fields, float_dtype: torch.dtype) -> Scheme:
    encoding = Encoding("blocks", "fp4", group=32, float_dtype=float_dtype)
    return Scheme(encoding, {"_blocks": "codes", "_scales": "scale"}, stem="")


METHODS: Mapping[str, Callable[[Fields, torch.dtype], Scheme]] = {
    "compressed-tensors": compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "modelopt": _modelopt,
    "auto-round": _auto_round,
    "intel/auto-round": _auto_round,
}
"""By quant_method."""

MODELOPT_NOTE = {"quant_algo", "kv_cache_quant_algo", "exclude_modules", "group_size", "quantized_layers"}
"""Of hf_quant_config.json; caches stay floats here."""
COMMON = {"quant_method", "modules_to_not_convert", "ignored_layers", "ignore", "backend", "version", "meta"}
"""Fields of several methods: which modules stay floats is seen from their tensors."""
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
    "auto-round": auto_round.KNOWN,
    "intel/auto-round": auto_round.KNOWN,
    "modelopt": {
        *COMMON,
        *("quant_algo", "group_size", "config_groups", "quantized_layers", "kv_cache_scheme", "kv_cache_quant_algo"),
        *("producer", "exclude_modules", "quantization"),
    },
}
"""By quant_method: what is read here, and what tools write down of how the codes were found."""
