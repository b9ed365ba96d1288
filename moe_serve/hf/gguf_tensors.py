"""A GGUF checkpoint's tensors under the names of the transformers model: experts where they lie, the rest as floats.

The `gguf` package knows which of llama.cpp's names each of a model's parameters has. What llama.cpp's converter does
to some tensors, such as an order of rows, is undone here.

Shape alphabet: E experts of a layer, N rows, K columns, D values of a head.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, dequantize, get_tensor_name_map

from expert_cache.storage.store import StoredTensor
from moe_serve.errors import CheckpointError
from moe_serve.gguf_files.folder import Listing
from moe_serve.gguf_files.reading import GgufTensor
from moe_serve.hf import gguf_layouts
from moe_serve.hf.dense import rows_of
from moe_serve.hf.stand_ins import StandIns
from moe_serve_kernels.cpu.expert_mlp import Matrix
from moe_serve_kernels.quantized import READABLE_BLOCKS, BlockRows, row_bytes

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
EXPERT = re.compile(
    r"blk\.(?P<layer>\d+)\.ffn_(?P<part>gate|up|down|gate_up)(_exps|\.(?P<expert>\d+))\.(?P<kind>weight|bias)$"
)
"""All experts of a layer, or one of them in files of 2023."""
PERMUTED = re.compile(r"blk\.\d+\.attn_(?P<which>[qk])\.(weight|bias)$")
PERMUTED_ARCHITECTURES = ("llama", "granitemoe", "granitehybrid", "nemotron_h_moe")
"""Whose queries and keys llama.cpp keeps with each head's halves interleaved."""
RENAMED = (
    (re.compile(r"\.block_sparse_moe\.router\.weight$"), ".block_sparse_moe.gate.weight"),
    (re.compile(r"\.gate\.moe_statics\.e_score_correction_bias$"), ".gate.e_score_correction_bias"),
    (re.compile(r"^model\.layers\.(\d+)\.mixer\."), r"backbone.layers.\1.mixer."),
)
"""Parameters that the package knows under another model's name."""
UNUSED = re.compile(r"\.nextn\.")
"""Layers for predicting several tokens at once."""
ROPE_FACTORS = "rope_freqs.weight"
"""What rotary frequencies are divided by, one by one: Llama 3's scaling, as llama.cpp's converter writes it."""


def expert_tensors(listing: Listing, has_gate: bool = True) -> Iterator[tuple[int, str, int | None, StoredTensor]]:
    """(decoder layer, part, expert, tensor), or None and [E, ..] where a tensor has all; nothing is read.

    `has_gate`: as in Family; where it is False, an up matrix is given as the gate too.
    """
    maps = _Maps(listing)
    for name, tensor in listing.tensors.items():
        match = EXPERT.match(name)
        if match:
            part = match["part"] if match["kind"] == "weight" else f"{match['part']}_bias"
            expert = None if match["expert"] is None else int(match["expert"])
            stored = maps.stored(tensor)
            yield int(match["layer"]), part, expert, stored
            if not has_gate and part == "up":
                yield int(match["layer"]), "gate", expert, stored


def dense_bytes(listing: Listing, dtype: torch.dtype, as_stored: bool) -> int:
    """Of all but the experts in memory. `as_stored`: matrices that kernels read stay as they are. All else becomes
    values of `dtype`."""
    dense = (tensor for name, tensor in listing.tensors.items() if not EXPERT.match(name))
    return sum(_bytes_in_memory(tensor, dtype, as_stored) for tensor in dense)


def _bytes_in_memory(tensor: GgufTensor, dtype: torch.dtype, as_stored: bool) -> int:
    values = math.prod(tensor.shape)
    is_multiplied = as_stored and len(tensor.shape) == 2
    if is_multiplied and tensor.type in FLOATS:
        return values * min(FLOATS[tensor.type].itemsize, dtype.itemsize)
    if is_multiplied and tensor.type in READABLE_BLOCKS:
        return tensor.shape[0] * row_bytes(tensor.type, tensor.shape[1])
    return values * dtype.itemsize


def dense_state(
    listing: Listing, shapes: Mapping[str, tuple[int, ...]], hf_config: Any, stand_ins: StandIns | None = None
) -> dict[str, torch.Tensor]:
    """float32 tensors, and stand-ins of matrices that stay as they are stored, for the parameters in `shapes`, without
    experts. What the file lacks is left out.

    CheckpointError names a tensor of the file that the model has no place for, or one of a wrong size.
    """
    named = _names(listing, shapes, hf_config)
    sources = _Sources(listing, hf_config)
    state: dict[str, torch.Tensor] = {}
    for name, found in named.items():
        matrix = sources.matrix(found) if stand_ins is not None and len(shapes[name]) == 2 else None
        stand_in = None if stand_ins is None or matrix is None else stand_ins.offer(name, matrix)
        state[name] = sources.parameter(name, found).reshape(shapes[name]) if stand_in is None else stand_in
    sources.refuse_rope_factors()
    _refuse_leftovers(listing, sources.read, hf_config.num_hidden_layers)
    return state


def _names(listing: Listing, shapes: Mapping[str, tuple[int, ...]], hf_config: Any) -> dict[str, tuple[str, ...]]:
    """Parameter -> the file's tensors of it; parameters that are tied to others have none."""
    architecture = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == listing.architecture)
    known = get_tensor_name_map(architecture, hf_config.num_hidden_layers)
    found: dict[str, tuple[str, ...]] = {}
    for name, shape in shapes.items():
        parts = gguf_layouts.sources_of(name)
        if parts and all(part in listing.tensors for part in parts):
            found[name] = parts
            continue
        for candidate in _candidates(known.get_name, name):
            if candidate in listing.tensors or _halves_of(candidate, listing):
                _check_size(listing, candidate, shape)
                found[name] = (candidate,)
                break
    return found


def _candidates(name_of: Callable[..., str | None], parameter: str) -> Iterator[str]:
    for pattern, replacement in RENAMED:
        parameter = pattern.sub(replacement, parameter)
    name = name_of(parameter, (".weight", ".bias"))
    if name is not None:
        yield name
        yield f"{name}.weight"
    if parameter.endswith("_bias") and (name := name_of(parameter.removesuffix("_bias"))) is not None:
        yield f"{name}.bias"


def _check_size(listing: Listing, name: str, shape: tuple[int, ...]) -> None:
    tensor = listing.tensors.get(name)
    if tensor is not None and math.prod(tensor.shape) != math.prod(shape):
        file = listing.files[tensor.file]
        raise CheckpointError(f"{file}: {name} has shape {tensor.shape}, but the metadata asks for {shape}")


def _halves_of(name: str, listing: Listing) -> bool:
    """Whether latent attention's matrix from the latents is stored as one for keys and one for values."""
    return name.endswith("attn_kv_b.weight") and name.replace("kv_b", "k_b") in listing.tensors


def _refuse_leftovers(listing: Listing, read: set[str], num_layers: int) -> None:
    rest = sorted(
        name
        for name in listing.tensors.keys() - read
        if not EXPERT.match(name) and not UNUSED.search(name) and not _is_behind(name, num_layers)
    )
    if rest:
        raise CheckpointError(
            f"{listing.files[0]}: {len(rest)} tensors have no place in the model: {', '.join(rest[:5])}"
        )


def _is_behind(name: str, num_layers: int) -> bool:
    layer = re.match(r"blk\.(\d+)\.", name)
    return layer is not None and int(layer[1]) >= num_layers


class _Maps:
    """The files, mapped, and tensors as views of them."""

    def __init__(self, listing: Listing) -> None:
        self._files = listing.files
        self._maps = [torch.from_numpy(np.memmap(file, mode="c")) for file in listing.files]

    def stored(self, tensor: GgufTensor) -> StoredTensor:
        """Floats as such; blocks as bytes, a row of them where a row of values would be."""
        file, dtype = self._files[tensor.file], FLOATS.get(tensor.type)
        if dtype is None:
            shape = (*tensor.shape[:-1], self._row_bytes(tensor))
            blocks = self._bytes(tensor, math.prod(shape)).view(shape)
            return StoredTensor(tensor.name, blocks, file, tensor.offset, tensor.type)
        count = math.prod(tensor.shape) * dtype.itemsize
        return StoredTensor(tensor.name, self._bytes(tensor, count).view(dtype).view(tensor.shape), file, tensor.offset)

    def _row_bytes(self, tensor: GgufTensor) -> int:
        try:
            return row_bytes(tensor.type, tensor.shape[-1])
        except ValueError as error:
            raise CheckpointError(f"{self._files[tensor.file]}: {tensor.name}: {error}") from error

    def _bytes(self, tensor: GgufTensor, count: int) -> torch.Tensor:
        found = self._maps[tensor.file][tensor.offset : tensor.offset + count]
        if len(found) < count:
            raise CheckpointError(f"{self._files[tensor.file]}: cut off within {tensor.name}; download it again")
        return found


class _Sources:
    """A file's dense tensors as a transformers model has them, in float32."""

    def __init__(self, listing: Listing, hf_config: Any) -> None:
        self._listing, self._config = listing, hf_config
        self._maps = _Maps(listing)
        self.read: set[str] = set()
        """Names of tensors that were asked for."""

    def parameter(self, parameter: str, names: tuple[str, ...]) -> torch.Tensor:
        """A parameter from the tensors that hold it."""
        parts = [self._values(name) for name in names]
        return parts[0] if len(parts) == 1 else gguf_layouts.joined(parameter, parts, self._config)

    def matrix(self, names: tuple[str, ...]) -> Matrix | None:
        """A parameter's [N, K] as the file stores it; None where its values must be changed first."""
        tensor = self._listing.tensors.get(names[0])
        is_same = tensor is not None and len(tensor.shape) == 2
        if len(names) > 1 or not is_same or gguf_layouts.is_changed(self._listing.architecture, names[0]):
            return None
        self.read.add(names[0])
        stored = self._maps.stored(self._listing.tensors[names[0]])
        matrix: torch.Tensor | BlockRows = stored.tensor
        if stored.block_type is not None:
            matrix = BlockRows(stored.block_type, stored.tensor, self._listing.tensors[names[0]].shape[1])
        if (heads := self._heads_to_permute(names[0])) is None:
            return matrix
        order = _halves_apart(torch.arange(matrix.shape[0]), heads)
        return rows_of(matrix, order)

    def refuse_rope_factors(self) -> None:
        """CheckpointError, unless they are all 1 or there are none."""
        if ROPE_FACTORS in self._listing.tensors and not (self._stored(ROPE_FACTORS) == 1).all():
            raise CheckpointError(
                f"{self._listing.files[0]}: {ROPE_FACTORS} scales rotary frequencies one by one, which moe-serve does "
                "not do for GGUF files; serve the checkpoint that the file was made from"
            )

    def _values(self, name: str) -> torch.Tensor:
        """Under llama.cpp's name, with what its converter did undone."""
        if name not in self._listing.tensors:
            return self._joined(name)
        values = gguf_layouts.undone(self._listing.architecture, name, self._stored(name), self._config)
        heads = self._heads_to_permute(name)
        return values if heads is None else _halves_apart(values, heads)

    def _heads_to_permute(self, name: str) -> int | None:
        """How many heads a tensor has whose halves are interleaved; None for another tensor."""
        match = PERMUTED.match(name)
        if match is None or self._listing.architecture not in PERMUTED_ARCHITECTURES:
            return None
        heads: int = self._config.num_attention_heads if match["which"] == "q" else self._config.num_key_value_heads
        return heads

    def _stored(self, name: str) -> torch.Tensor:
        self.read.add(name)
        stored = self._maps.stored(self._listing.tensors[name])
        if stored.block_type is None:
            return stored.tensor.to(torch.float32)
        return torch.from_numpy(dequantize(stored.tensor.numpy(), GGMLQuantizationType[stored.block_type]))

    def _joined(self, name: str) -> torch.Tensor:
        """Keys' [heads, latents, D] and values' [heads, D, latents] as DeepSeek's one matrix [heads * 2 D, latents]."""
        keys, values = (self._stored(name.replace("kv_b", half)) for half in ("k_b", "v_b"))
        return torch.cat([keys.transpose(1, 2), values], dim=1).flatten(0, 1)


def _halves_apart(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """[heads * D, ..] with rotary pairs side by side -> with each head's first values before its second ones."""
    apart: torch.Tensor = rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    return apart
