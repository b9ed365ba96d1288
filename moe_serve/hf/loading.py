"""Loading: a checkpoint folder becomes a dense Hugging Face model and an ExpertStore beside it.

The dense part (embeddings, attention, norms, routers, shared experts) is loaded by transformers
itself; the experts stay in the files. Knows nothing of batches, pages or requests.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM

from expert_cache.storage.expert_file import DTYPE_NAMES
from expert_cache.storage.store import ExpertStore, matrices_of
from moe_serve.errors import CheckpointError, UnsupportedModelError
from moe_serve.execution.kv_cache import LayerKVShape
from moe_serve.execution.state_cache import StateShapes
from moe_serve.gguf_files.folder import listing_in
from moe_serve.hf import attention, chunked_attention, dense, fixed_order, gguf_tensors, latent_attention, recurrent
from moe_serve.hf.checkpoint import (
    dense_dtypes,
    dense_tensors,
    has_usual_names,
    open_expert_file,
    open_experts,
    tensor_names,
    weight_files,
)
from moe_serve.hf.composites import OTHER_TOWERS, key_mapping, towers_in
from moe_serve.hf.config_file import naming, scheme_in
from moe_serve.hf.experts import find_experts, replacing
from moe_serve.hf.family import Family, family_of
from moe_serve.hf.leftovers import refuse_gaps, refuse_leftovers
from moe_serve.hf.progress_bar import bar_only_on_terminals
from moe_serve.hf.quantization_scheme import Scheme
from moe_serve.hf.quantized_dense import dense_state
from moe_serve.hf.shard_index import refuse_false_index
from moe_serve.hf.size_guard import refuse_wrong_sizes
from moe_serve.spec import ModelSpec
from moe_serve_kernels.cpu.expert_mlp import are_readable
from moe_serve_kernels.quantized import BlockRows

META = torch.device("meta")
log = logging.getLogger(__name__)

Shapes = tuple[dict[int, LayerKVShape], StateShapes]
"""What each layer keeps: per token, and per sequence."""
WITHOUT_MEMORY = ("moe", "mlp")
"""Kinds of layers that see one token at a time."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model without experts, the store that has them, and what the model caches per token."""

    model: nn.Module
    hf_config: Any
    family: Family
    store: ExpertStore
    kv_shapes: dict[int, LayerKVShape]
    state_shapes: StateShapes
    """What recurrent layers keep per sequence."""


def load(
    folder: str,
    hf_config: Any,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    expert_file: str | None = None,
) -> LoadedModel:
    """Load a checkpoint folder whose config was read. ConfigError's subclasses name what is wrong with it.

    `expert_file`: take the experts from there (made by `moe-serve pack`).
    """
    with naming(f"{folder}: config.json and the tensors make no model"):
        return _load(folder, hf_config, spec, dtype, device, expert_file)


def _load(
    folder: str,
    hf_config: Any,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    expert_file: str | None,
) -> LoadedModel:
    family, scheme = family_of(hf_config), scheme_in(folder, hf_config)
    refuse_false_index(folder)
    refuse_wrong_sizes(
        folder, weight_files(folder), tensor_names(folder), spec.num_layers, lambda: _dense_shapes(hf_config)
    )
    keeps_bf16 = _dense_types(folder, family, scheme) == {"BF16"} and dense.is_available(device, dtype)
    model = _load_dense(folder, hf_config, family, torch.bfloat16 if keeps_bf16 else dtype, scheme).to(device)
    if keeps_bf16:
        dense.compute_in_float32(model, family.widened)
    layers = sorted(find_experts(model))
    if not layers:
        raise UnsupportedModelError(f"{folder}: this {hf_config.model_type} config has no MoE layer")
    if expert_file is None:
        store = open_experts(folder, family, layers, spec, scheme)
    else:
        store = open_expert_file(expert_file, folder, layers, spec)
    _say_how_experts_run(store, scheme)
    _adapt(model, hf_config, family)
    if family.recurrence is not None and dense.is_available(device, dtype):
        fixed_order.install(model, family.widened)
    kv_shapes, state_shapes = _probe_shapes(model, device)
    _refuse_unknown_layers(folder, hf_config, kv_shapes.keys() | state_shapes.keys())
    return LoadedModel(model, hf_config, family, store, kv_shapes, state_shapes)


def _refuse_unknown_layers(folder: str, hf_config: Any, known: set[int]) -> None:
    """A layer that mixes tokens and keeps neither keys nor a state that we carry would answer from its own token."""
    kinds = getattr(hf_config, "layer_types", None) or ["full_attention"] * hf_config.num_hidden_layers
    unknown = {i: kind for i, kind in enumerate(kinds) if i not in known and kind not in WITHOUT_MEMORY}
    if unknown:
        raise UnsupportedModelError(
            f"{folder}: {len(unknown)} of the {len(kinds)} layers of this {hf_config.model_type} model"
            f" ({', '.join(sorted(set(unknown.values())))}) cache no keys; state of another kind is not carried here"
        )


def _dense_types(folder: str, family: Family, scheme: Scheme | None) -> set[str]:
    """safetensors' names of the types in which everything but experts is stored; none for blocks, which are decoded."""
    if listing_in(folder) is not None:
        return set()
    stored = dense_dtypes(folder, family, scheme is not None)
    if scheme is None:
        return stored
    return {DTYPE_NAMES.get(tensor.tensor.dtype, "") for tensor in dense_tensors(folder, family, scheme)}


def _say_how_experts_run(store: ExpertStore, scheme: Scheme | None) -> None:
    if scheme is not None and scheme.rounds_activations:
        log.info("the checkpoint was made for quantised activations; this server computes activations as floats")
    if store.is_copied:
        log.warning(
            "the kernels cannot read this checkpoint's order of columns: each expert is copied when it is read, which"
            " takes memory beside its slot. `moe-serve pack` makes a file in the right order"
        )
    elif (unreadable := _unreadable(store)) is not None:
        log.warning(
            "the kernels cannot read experts %s: each is dequantised on every use, which is slow; it takes %d MiB then",
            unreadable,
            3 * store.shape[0] * store.shape[1] * torch.float32.itemsize >> 20,
        )


def _unreadable(store: ExpertStore) -> str | None:
    """What of a quantised checkpoint's experts no kernel reads; None where all are read."""
    if store.encoding is not None:
        is_read = are_readable(matrices_of(store.weights(store.layers[0], 0)))
        return None if is_read else f"quantised in groups of {store.encoding.group} columns"
    matrices = [matrix for layer in store.layers for matrix in matrices_of(store.weights(layer, 0))]
    types = {matrix.type for matrix in matrices if isinstance(matrix, BlockRows) and not are_readable([matrix])}
    return f"in blocks of type {', '.join(sorted(types))}" if types else None


def _load_dense(
    folder: str, hf_config: Any, family: Family, dtype: torch.dtype, scheme: Scheme | None = None
) -> nn.Module:
    attention.register()
    model_class, names = _model_class(hf_config, family), tensor_names(folder)
    try:
        with replacing(family.experts_class), _ignoring_expert_keys(model_class, family), bar_only_on_terminals():
            loaded: Any = model_class.from_pretrained(
                **_source(folder, hf_config, family, dtype, scheme, model_class),
                dtype=dtype,
                key_mapping=key_mapping(names),
                attn_implementation=attention.NAME,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they come back in the info, by name
            )
            model, info = loaded
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder}: {error}") from error
    refuse_gaps(folder, info)
    _say_what_is_left_out(names)
    refuse_leftovers(folder, weight_files(folder), info["unexpected_keys"], hf_config)
    loaded_model: nn.Module = model.eval()
    return loaded_model


def _model_class(hf_config: Any, family: Family) -> Any:
    """The text model's causal class; imports its modeling file."""
    if family.model_class is not None:
        return getattr(transformers, family.model_class)
    return AutoModelForCausalLM._model_mapping[type(hf_config)]


def _say_what_is_left_out(names: Iterable[str]) -> None:
    towers = ", ".join(f"{tower} ({count} tensors)" for tower, count in towers_in(names).items())
    if towers:
        log.info("only the text model is served; not read: %s", towers)


def _source(
    folder: str, hf_config: Any, family: Family, dtype: torch.dtype, scheme: Scheme | None, model_class: Any
) -> dict[str, Any]:
    """Where transformers takes the dense part from: the folder or, if that is quantised or its files have names that
    transformers does not look for, the tensors themselves."""
    if (listing := listing_in(folder)) is not None:
        with torch.device("meta"):
            empty = model_class._from_config(hf_config, attn_implementation=attention.NAME)
        shapes = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
        state = gguf_tensors.dense_state(listing, shapes, hf_config)
        wide = sum(tensor.numel() for tensor in state.values()) * dtype.itemsize
        log.info("all but the experts of a GGUF file is kept as %s: %d MiB", str(dtype)[6:], wide >> 20)
        return _given(hf_config, state)
    if scheme is None and has_usual_names(folder):
        return {"pretrained_model_name_or_path": folder, "config": hf_config}
    if scheme is None:
        tensors = {stored.name: stored.tensor for stored in dense_tensors(folder, family, None)}
        return _given(hf_config, tensors)
    plain = copy.deepcopy(hf_config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    state = dense_state(dense_tensors(folder, family, scheme), scheme, dtype)
    return _given(plain, state)


def _given(config: Any, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {"pretrained_model_name_or_path": None, "config": config, "state_dict": state}


@contextmanager
def _ignoring_expert_keys(model_class: Any, family: Family) -> Iterator[None]:
    """Expert tensors are not "unexpected", and towers are known. Without this they fill the log."""
    before = model_class._keys_to_ignore_on_load_unexpected
    # transformers joins all patterns into one, which forbids repeated group names.
    patterns = [re.sub(r"\(\?P<\w+>", "(?:", p.pattern) for p in family.patterns]
    model_class._keys_to_ignore_on_load_unexpected = [*(before or []), *patterns, OTHER_TOWERS.pattern]
    try:
        yield
    finally:
        model_class._keys_to_ignore_on_load_unexpected = before


def _adapt(model: nn.Module, hf_config: Any, family: Family) -> None:
    """Have the model's modules take a step's flattened tokens, of many sequences."""
    _set_windows(model, hf_config, family)
    chunked_attention.install(model, hf_config)
    latent_attention.install(model)
    recurrent.install(model, family.recurrence)
    if family.adapt is not None:
        family.adapt(model, hf_config)


def _set_windows(model: nn.Module, hf_config: Any, family: Family) -> None:
    """Give attention modules the sliding window that transformers applies through masks alone."""
    window = getattr(hf_config, "sliding_window", None)
    if not family.masks_by_config_window or window is None:
        return
    for module in model.modules():
        if hasattr(module, "layer_idx") and hasattr(module, "q_proj"):
            module.sliding_window = window


def shapes_of(hf_config: Any) -> Shapes:
    """What each layer would keep per token and per sequence, asked of a model without weights."""
    attention.register()
    model = empty_model(hf_config, attn_implementation=attention.NAME)
    _adapt(model, hf_config, family_of(hf_config))
    shapes: Shapes = _probe_shapes(model, META)
    return shapes


def empty_model(hf_config: Any, **options: Any) -> nn.Module:
    """The model without experts and without memory: all its parameters are on the meta device."""
    family = family_of(hf_config)
    with replacing(family.experts_class), META:
        model: nn.Module = _model_class(hf_config, family)._from_config(copy.deepcopy(hf_config), **options)
    return model


def _dense_shapes(hf_config: Any) -> dict[str, tuple[int, ...]]:
    """Every dense parameter's shape."""
    return {name: tuple(parameter.shape) for name, parameter in empty_model(hf_config).named_parameters()}


@torch.inference_mode()
def _probe_shapes(model: nn.Module, device: torch.device) -> Shapes:
    """Run one token through the dense part to see what each layer would keep."""
    probe, states = attention.KVShapeProbe(), recurrent.StateProbe()
    recurrent.connect(model, states)
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    # With a mask, transformers does not look into position ids for packed sequences, which have no values on `meta`.
    model(input_ids=token, attention_mask=token + 1, use_cache=False, forward_batch=None, kv_cache=probe)
    return probe.shapes, states.shapes
