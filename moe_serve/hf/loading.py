"""Loading: a checkpoint folder becomes a dense Hugging Face model and an ExpertStore beside it.

The dense part (embeddings, attention, norms, routers, shared experts) is loaded by transformers
itself; the experts stay in the files. Knows nothing of batches, pages or requests.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from expert_cache.storage.store import ExpertStore, matrices_of
from moe_serve.errors import UnsupportedModelError
from moe_serve.execution.kv_cache import LayerKVShape
from moe_serve.execution.state_cache import StateShapes
from moe_serve.hf import attention, chunked_attention, dense, fixed_order, latent_attention, recurrent
from moe_serve.hf.checkpoint import dense_codes_in, open_expert_file, open_experts, tensor_names, weight_files
from moe_serve.hf.config_file import naming, scheme_in
from moe_serve.hf.dense_loading import DenseLoader, dense_shapes, empty_model
from moe_serve.hf.experts import find_experts
from moe_serve.hf.family import Family, family_of
from moe_serve.hf.scheme import Scheme
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
        folder, weight_files(folder), tensor_names(folder), spec.num_layers, lambda: dense_shapes(hf_config)
    )
    model = DenseLoader(folder, hf_config, family, scheme).load(spec, dtype, device)
    layers = sorted(find_experts(model))
    if not layers:
        raise UnsupportedModelError(f"{folder}: this {hf_config.model_type} config has no MoE layer")
    if expert_file is None:
        store = open_experts(folder, family, layers, spec, scheme)
    else:
        store = open_expert_file(expert_file, folder, layers, spec)
        if dense.is_available(device, dtype) and (count := dense.use_codes(model, dense_codes_in(expert_file))):
            log.info("%d linear layers are computed from 12-bit codes", count)
    _say_how_experts_run(store, scheme)
    _adapt(model, hf_config, family)
    if fixed_order.is_available(device, dtype):
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


@torch.inference_mode()
def _probe_shapes(model: nn.Module, device: torch.device) -> Shapes:
    """Run one token through the dense part to see what each layer would keep."""
    probe, states = attention.KVShapeProbe(), recurrent.StateProbe()
    recurrent.connect(model, states)
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    # With a mask, transformers does not look into position ids for packed sequences, which have no values on `meta`.
    model(input_ids=token, attention_mask=token + 1, use_cache=False, forward_batch=None, kv_cache=probe)
    return probe.shapes, states.shapes
