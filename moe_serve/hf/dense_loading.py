"""The dense part of a model, loaded by transformers: attention, norms, routers, shared experts, embeddings.

Experts stay in the files. On a CPU with kernels, weights stay in the types in which they are stored. Knows nothing of
batches, pages or requests.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM

from expert_cache.storage.expert_file import DTYPE_NAMES
from moe_serve.errors import CheckpointError
from moe_serve.gguf_files.folder import Listing, listing_in
from moe_serve.hf import attention, dense, gguf_tensors, stand_ins
from moe_serve.hf.checkpoint import dense_dtypes, dense_tensors, has_usual_names, tensor_names, weight_files
from moe_serve.hf.composites import OTHER_TOWERS, key_mapping, towers_in
from moe_serve.hf.experts import replacing
from moe_serve.hf.family import Family, family_of
from moe_serve.hf.leftovers import refuse_gaps, refuse_leftovers
from moe_serve.hf.progress_bar import bar_only_on_terminals
from moe_serve.hf.quantized_dense import dense_state
from moe_serve.hf.scheme import Scheme
from moe_serve.hf.stand_ins import StandIns
from moe_serve.spec import ModelSpec

log = logging.getLogger(__name__)


class DenseLoader:
    """One checkpoint's dense part."""

    def __init__(self, folder: str, hf_config: Any, family: Family, scheme: Scheme | None) -> None:
        self._folder, self._config, self._family, self._scheme = folder, hf_config, family, scheme
        self._listing = listing_in(folder)
        self._model_class = model_class_of(hf_config, family)

    def load(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """The model without its experts, computing in `dtype`."""
        if self._types() == {"BF16"} and dense.is_available(device, dtype):
            model = self._from_transformers(torch.bfloat16, None).to(device)
            dense.compute_in_float32(model, self._family.widened)
            return model
        is_coded = self._listing is not None or self._scheme is not None
        if is_coded and stand_ins.are_available(device, dtype):
            return self._as_stored(dtype, (spec.num_experts, spec.hidden_size))
        return self._from_transformers(dtype, None).to(device)

    def _as_stored(self, dtype: torch.dtype, router: tuple[int, int]) -> nn.Module:
        """Weights in the types in which they are stored, as far as kernels read these."""
        refused: set[str] = set()
        while True:
            standing_in = StandIns(dtype, refused)
            model = self._from_transformers(dtype, standing_in)
            left = standing_in.replace(model, self._family.widened, router)
            if not left:
                log.info("weights outside the experts are computed as stored: %d MiB", standing_in.num_bytes >> 20)
                return model
            refused |= left

    def _types(self) -> set[str]:
        """safetensors' names of the types in which everything but experts is stored; none for blocks."""
        if self._listing is not None:
            return set()
        stored = dense_dtypes(self._folder, self._family, self._scheme is not None)
        if self._scheme is None:
            return stored
        tensors = dense_tensors(self._folder, self._family, self._scheme)
        return {DTYPE_NAMES.get(tensor.tensor.dtype, "") for tensor in tensors}

    def _from_transformers(self, dtype: torch.dtype, standing_in: StandIns | None) -> nn.Module:
        attention.register()
        names = tensor_names(self._folder)
        try:
            with self._experts_left_out(), bar_only_on_terminals():
                model, info = self._model_class.from_pretrained(
                    **self._source(dtype, standing_in),
                    dtype=dtype,
                    key_mapping=key_mapping(names),
                    attn_implementation=attention.NAME,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # they come back in the info, by name
                )
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._folder}: {error}") from error
        refuse_gaps(self._folder, info)
        _say_what_is_left_out(names)
        refuse_leftovers(self._folder, weight_files(self._folder), info["unexpected_keys"], self._config)
        loaded: nn.Module = model.eval()
        return loaded

    def _source(self, dtype: torch.dtype, standing_in: StandIns | None) -> dict[str, Any]:
        """Where transformers takes the dense part from: the folder, or the tensors themselves. The latter if these are
        quantised, or their files have names that transformers does not look for."""
        if self._listing is not None:
            return _given(self._config, self._gguf_state(self._listing, standing_in))
        if self._scheme is None and has_usual_names(self._folder):
            return {"pretrained_model_name_or_path": self._folder, "config": self._config}
        tensors = dense_tensors(self._folder, self._family, self._scheme)
        if self._scheme is None:
            return _given(self._config, {stored.name: stored.tensor for stored in tensors})
        plain = copy.deepcopy(self._config)
        if hasattr(plain, "quantization_config"):
            del plain.quantization_config
        return _given(plain, dense_state(tensors, self._scheme, dtype, standing_in))

    def _gguf_state(self, listing: Listing, standing_in: StandIns | None) -> dict[str, torch.Tensor]:
        with torch.device("meta"):
            empty = self._model_class._from_config(self._config, attn_implementation=attention.NAME)
        shapes = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
        return gguf_tensors.dense_state(listing, shapes, self._config, standing_in)

    @contextmanager
    def _experts_left_out(self) -> Iterator[None]:
        """No module for experts. Their tensors are not "unexpected", and towers are known: both would fill the log."""
        model_class = self._model_class
        before = model_class._keys_to_ignore_on_load_unexpected
        # transformers joins all patterns into one, which forbids repeated group names.
        patterns = [re.sub(r"\(\?P<\w+>", "(?:", p.pattern) for p in self._family.patterns]
        model_class._keys_to_ignore_on_load_unexpected = [*(before or []), *patterns, OTHER_TOWERS.pattern]
        try:
            with replacing(self._family.experts_class):
                yield
        finally:
            model_class._keys_to_ignore_on_load_unexpected = before


def model_class_of(hf_config: Any, family: Family) -> Any:
    """The text model's causal class; imports its modeling file."""
    if family.model_class is not None:
        return getattr(transformers, family.model_class)
    return AutoModelForCausalLM._model_mapping[type(hf_config)]


def empty_model(hf_config: Any, **options: Any) -> nn.Module:
    """The model without experts and without memory: all its parameters are on the meta device."""
    family = family_of(hf_config)
    with replacing(family.experts_class), torch.device("meta"):
        model: nn.Module = model_class_of(hf_config, family)._from_config(copy.deepcopy(hf_config), **options)
    return model


def dense_shapes(hf_config: Any) -> dict[str, tuple[int, ...]]:
    """Every dense parameter's shape."""
    return {name: tuple(parameter.shape) for name, parameter in empty_model(hf_config).named_parameters()}


def _say_what_is_left_out(names: Iterable[str]) -> None:
    towers = ", ".join(f"{tower} ({count} tensors)" for tower, count in towers_in(names).items())
    if towers:
        log.info("only the text model is served; not read: %s", towers)


def _given(config: Any, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {"pretrained_model_name_or_path": None, "config": config, "state_dict": state}
