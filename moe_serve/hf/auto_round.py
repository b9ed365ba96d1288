"""AutoRound's `quantization_config`, told in the words of the methods whose layouts it packs into.

`packing_format` says how: as GPTQ's first format (zero points less 1), as its second, or as AWQ. Knows fields; knows
no layouts and reads no tensors.
"""

from __future__ import annotations

from typing import Any

from moe_serve.hf.quantization_fields import Fields

GPTQ_V1, GPTQ_V2, AWQ = "gptq", "gptq_v2", "awq"
FORMS = {
    "auto_round:auto_gptq": GPTQ_V1,
    "auto_round:gptq": GPTQ_V1,
    "auto": GPTQ_V1,
    "auto_round:gptqmodel": GPTQ_V2,
    "auto_round": GPTQ_V2,
    "auto_round:auto_awq": AWQ,
    "auto_round:awq": AWQ,
}
"""By packing_format."""
FLOAT_BITS = (16, 32)
KNOWN = {
    *("quant_method", "packing_format", "bits", "group_size", "sym", "data_type", "act_bits", "extra_config"),
    *("backend", "provider", "autoround_version", "block_name_to_quantize", "to_quant_block_names", "quant_block_list"),
    *("act_data_type", "act_group_size", "act_sym", "act_dynamic", "amp", "batch_size", "dataset", "enable_alg_ext"),
    *("enable_minmax_tuning", "enable_norm_bias_tuning", "enable_quanted_input", "gradient_accumulate_steps", "iters"),
    *("lr", "low_gpu_mem_usage", "minmax_lr", "nsamples", "scale_dtype", "seqlen", "supported_types", "train_bs"),
    *("static_kv_dtype", "static_kv_granularity", "static_attention_granularity", "regex_config"),
}
"""What is read here, and what the tool writes down of how the codes were found."""


def translated(fields: Fields) -> Fields:
    """The same as GPTQ or AWQ says it. UnsupportedModelError names what has no such words."""
    form = FORMS[fields.choice("packing_format", tuple(FORMS), "auto")]
    fields.choice("data_type", ("int",), "int")
    fields.choice("act_bits", FLOAT_BITS, FLOAT_BITS[0])
    _refuse_other_layers(fields)
    is_symmetric = fields.flag("sym", default=True)
    sizes: dict[str, Any] = {name: fields.get(name) for name in ("bits", "group_size")}
    if form == AWQ:
        method: dict[str, Any] = {"quant_method": AWQ, "zero_point": not is_symmetric}
    else:
        method = {"quant_method": "gptq", "checkpoint_format": form, "sym": is_symmetric}
    return Fields({**method, **sizes}, fields.where, fields.path)


def _refuse_other_layers(fields: Fields) -> None:
    """`extra_config`: layers kept as floats are seen from their tensors; another width of codes is not followed."""
    layers = fields.object("extra_config")
    for layer in layers.names():
        extra = layers.object(layer)
        same = extra.get("bits") in (None, fields.get("bits")) and all(
            extra.get(name) in (None, fields.get(name)) for name in ("group_size", "sym", "data_type")
        )
        if not same:
            extra.choice("bits", FLOAT_BITS)
