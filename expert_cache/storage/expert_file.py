"""The expert file: all experts of a checkpoint, one aligned blob each, with a checksum.

Made once by `moe-serve pack`. It is an ordinary safetensors file whose tensors are laid out so that
an expert's gate, up, down and biases follow one another, rows as our kernels read them, and start at
a multiple of BLOCK_BYTES: one direct read brings a whole expert. The metadata holds the checksums and
the fingerprint of the checkpoint it was made from.

Made with --lossless, bf16 matrices are in 12-bit codes (moe_serve_kernels.cpu.coded): `gate` is then its codes,
`gate_exponents` its table, `gate_rare` its list of rare weights. Dense weights in codes may follow the experts
(dense_codes.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
import xxhash

from expert_cache.storage import dense_codes, lossless
from expert_cache.storage.dense_codes import DenseCodes
from expert_cache.storage.direct_io import BLOCK_BYTES
from expert_cache.storage.encoding import Encoding
from expert_cache.storage.safetensors_file import stored_tensors
from expert_cache.storage.store import ExpertStore, ExpertWeights, StoredTensor
from moe_serve_base.safetensors_header import LENGTH_BYTES, read_header
from moe_serve_base.whole_files import whole_file
from moe_serve_kernels.cpu.coded import CodedRows
from moe_serve_kernels.quantized import BlockRows, QuantizedRows
from predictors.shape import Key

FORMAT = "moe-serve-experts-1"
CODED_FORMAT = "moe-serve-experts-2"
"""Of files with 12-bit codes, which older versions cannot read."""
NAME = re.compile(
    r"layers\.(?P<layer>\d+)\.experts\.(?P<expert>\d+)\.(?P<part>(?:gate|up|down)(?:_bias|_scale|_zero|_factor|_exponents|_rare)?)$"
)
MATRICES = ("gate", "up", "down")
PADDING = "padding"
DTYPE_NAMES = {
    **{torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"},
    **{torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3", torch.int32: "I32"},
}
"""safetensors' names."""
NO_CHECKSUM = "0" * 16
Contents = dict[Key, list[tuple[str, torch.dtype, tuple[int, ...]]]]
"""What each expert's blob holds, in file order: part, dtype, shape."""
Tensors = dict[int, dict[tuple[str, int | None], StoredTensor]]
"""By decoder layer, then by (part, expert)."""


def fingerprint(files: Iterable[Path]) -> str:
    """Identifies a checkpoint by its files' names and headers (tensor names, shapes, places), not their contents."""
    digest = hashlib.sha256()
    for file in sorted(files):
        header, _ = read_header(file)
        digest.update(json.dumps([file.name, header], sort_keys=True).encode())
    return digest.hexdigest()


def write(
    store: ExpertStore,
    path: Path,
    source: str,
    on_expert: Callable[[], None],
    *,
    is_coded: bool = False,
    dense: DenseCodes | None = None,
) -> None:
    """Write every expert of `store`. `source`: the fingerprint of its checkpoint. `on_expert`: after each one.
    `is_coded`: bf16 matrices, which all must be, as 12-bit codes where that takes less memory. `dense` follows the
    experts then.

    The file appears under its name only when it is complete. OutputError (an OSError) if the disk is full.
    """
    contents, dense = _largest_contents(store, is_coded), dense or {}
    with whole_file(path) as partial, partial.open("wb") as stream:
        start = len(_header_bytes(store, source, contents, {}, is_coded, dense))
        stream.seek(start)
        checksums: dict[Key, str] = {}
        for key in _keys(store, on_expert):
            weights = lossless.coded(store.weights(*key)) if is_coded else store.weights(*key)
            contents[key] = _content(weights)
            checksums[key] = _write_expert(stream, weights)
        for _, tensor in dense_codes.tensors_of(dense):
            stream.write(dense_codes.octets(tensor))
        stream.seek(0)
        header = _header_bytes(store, source, contents, checksums, is_coded, dense)
        assert len(header) <= start, "the header has grown"
        stream.write(_filled(header, start))


def _largest_contents(store: ExpertStore, is_coded: bool) -> Contents:
    """What the experts will hold, if each is as large as one can be: of this the header's room is made."""
    firsts = {layer: store.weights(layer, 0) for layer in store.layers}
    by_layer = {layer: _content(lossless.largest(w) if is_coded else w) for layer, w in firsts.items()}
    return {key: by_layer[key[0]] for key in _keys(store, lambda: None)}


def _content(weights: ExpertWeights) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    return [(part, tensor.dtype, tuple(tensor.shape)) for part, tensor in _present(weights)]


def read(path: Path) -> tuple[ExpertStore, str]:
    """(store, fingerprint of the checkpoint it was made from). ValueError or OSError if this is no expert file."""
    header, _ = read_header(path)
    metadata = header.get("__metadata__", {})
    if metadata.get("format") not in (FORMAT, CODED_FORMAT):
        raise ValueError(f"not an expert file of format {FORMAT}; make it with `moe-serve pack`")
    tensors: Tensors = {}
    for stored in stored_tensors(path, lambda name: NAME.match(name) is not None):
        match = NAME.match(stored.name)
        assert match
        tensors.setdefault(int(match["layer"]), {})[match["part"], int(match["expert"])] = stored
    num_experts = 1 + max(expert for _, expert in next(iter(tensors.values())) if expert is not None)
    sums = {tuple(map(int, key.split("."))): value for key, value in json.loads(metadata["checksums"]).items()}
    checksums = {(k[0], k[1]): v for k, v in sums.items()}
    encoding, shape = _encoding_from(metadata.get("encoding", "null"))
    if metadata["format"] == CODED_FORMAT:
        shape = _shape_from(metadata["shape"])
    if "blocks" in metadata:
        tensors, shape = _in_blocks(tensors, json.loads(metadata["blocks"]))
    store = ExpertStore(tensors, num_experts, None, checksums, encoding, shape)
    if metadata["format"] == CODED_FORMAT:
        lossless.refuse_damage(store)
    return store, metadata["source"]


def _shape_from(text: str) -> tuple[int, int]:
    inner, hidden = json.loads(text)
    return int(inner), int(hidden)


def _blocks_of(store: ExpertStore) -> dict[str, Any]:
    """How matrices in ggml's blocks are written: an expert's (I, H), and the type by decoder layer and part."""
    types: dict[str, str] = {}
    for layer in store.layers:
        weights = store.weights(layer, 0)
        for part in MATRICES:
            matrix = getattr(weights, part)
            if isinstance(matrix, BlockRows):
                types[f"{store.decoder_layer(layer)}.{part}"] = matrix.type
    return {"shape": store.shape, "types": types}


def _in_blocks(tensors: Tensors, blocks: dict[str, Any]) -> tuple[Tensors, tuple[int, int]]:
    """`tensors` with their types as `_blocks_of` noted them, and an expert's (I, H)."""
    typed = {
        layer: {
            (part, expert): dataclasses.replace(stored, block_type=blocks["types"].get(f"{layer}.{part}"))
            for (part, expert), stored in parts.items()
        }
        for layer, parts in tensors.items()
    }
    inner, hidden = blocks["shape"]
    return typed, (inner, hidden)


def _keys(store: ExpertStore, on_expert: Callable[[], None]) -> Iterator[Key]:
    for layer in store.layers:
        for expert in range(store.num_experts):
            yield layer, expert
            on_expert()


def _present(weights: ExpertWeights) -> Iterator[tuple[str, torch.Tensor]]:
    """What is written of an expert, in file order: the matrices, and then what is small."""
    matrices = {part: getattr(weights, part) for part in MATRICES}
    for part, matrix in matrices.items():
        yield part, matrix if isinstance(matrix, torch.Tensor) else matrix.tensors[0]
    for part, matrix in matrices.items():
        if isinstance(matrix, QuantizedRows):
            small = {"scale": matrix.scales, "zero": matrix.zeros, "factor": matrix.factor}
            yield from ((f"{part}_{role}", tensor) for role, tensor in small.items() if tensor is not None)
        if isinstance(matrix, CodedRows):
            yield from ((f"{part}_{role}", getattr(matrix, role)) for role in lossless.ROLES)
    for part in MATRICES:
        bias = getattr(weights, f"{part}_bias")
        if bias is not None:
            yield f"{part}_bias", bias


def _encoding_of(store: ExpertStore) -> str:
    """How the quantised matrices of all experts are written, as JSON."""
    encoding = store.encoding
    if encoding is None or not isinstance(store.weights(store.layers[0], 0).gate, QuantizedRows):
        return "null"
    names = ("kind", "group", "rows_per_scale", "zero", "divides")
    return json.dumps({**{name: getattr(encoding, name) for name in names}, "shape": store.shape})


def _encoding_from(text: str) -> tuple[Encoding | None, tuple[int, int]]:
    fields = json.loads(text)
    if fields is None:
        return None, (0, 0)
    inner, hidden = fields.pop("shape")
    return Encoding("rows", **fields), (inner, hidden)


def _write_expert(stream: IO[bytes], weights: ExpertWeights) -> str:
    digest, size = xxhash.xxh3_64(), 0
    for _, tensor in _present(weights):
        data = dense_codes.octets(tensor)
        digest.update(data)
        stream.write(data)
        size += len(data)
    stream.write(b"\0" * _padding(size))
    return digest.hexdigest()


def _padding(size: int) -> int:
    return -size % BLOCK_BYTES


def _header_bytes(
    store: ExpertStore, source: str, contents: Contents, checksums: dict[Key, str], is_coded: bool, dense: DenseCodes
) -> bytes:
    """Length and header, filled up with blanks so that the data starts on a block; the same length for any sums."""
    keys = _keys(store, lambda: None)
    sums = {f"{store.decoder_layer(key[0])}.{key[1]}": checksums.get(key, NO_CHECKSUM) for key in keys}
    metadata = {"format": FORMAT, "source": source, "checksums": json.dumps(sums)}
    if is_coded:
        metadata |= {"format": CODED_FORMAT, "shape": json.dumps(tuple(store.weights(store.layers[0], 0).gate.shape))}
    elif (encoding := _encoding_of(store)) != "null":
        metadata["encoding"] = encoding
    if (blocks := _blocks_of(store))["types"]:
        metadata["blocks"] = json.dumps(blocks)
    entries = _entries(store, contents, is_coded)
    if dense:
        metadata[dense_codes.METADATA] = dense_codes.note(dense)
        entries |= _dense_entries(dense, next(reversed(entries.values()))["data_offsets"][1])
    text = json.dumps({**entries, "__metadata__": metadata}).encode()
    size = LENGTH_BYTES + len(text)
    return _filled(len(text).to_bytes(LENGTH_BYTES, "little") + text, size + _padding(size))


def _filled(header: bytes, size: int) -> bytes:
    """With blanks, up to `size` bytes with the length."""
    return (size - LENGTH_BYTES).to_bytes(LENGTH_BYTES, "little") + header[LENGTH_BYTES:].ljust(size - LENGTH_BYTES)


def _entries(store: ExpertStore, contents: Contents, is_coded: bool) -> dict[str, Any]:
    """The header's tensors. Where sizes vary, padding is one of them even if it is empty: so no header is longer than
    that of the largest experts."""
    entries: dict[str, Any] = {}
    offset = 0
    for (layer, expert), content in contents.items():
        first, name = offset, f"layers.{store.decoder_layer(layer)}.experts.{expert}"
        for part, dtype, shape in content:
            entries[f"{name}.{part}"] = _entry(dtype, shape, offset)
            offset = entries[f"{name}.{part}"]["data_offsets"][1]
        padding = _padding(offset - first)
        if padding or is_coded:
            entries[f"{name}.{PADDING}"] = _entry(torch.uint8, (padding,), offset)
            offset += padding
    return entries


def _dense_entries(dense: DenseCodes, offset: int) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for name, tensor in dense_codes.tensors_of(dense):
        entries[name] = _entry(tensor.dtype, tensor.shape, offset)
        offset += tensor.nbytes
    return entries


def _entry(dtype: torch.dtype, shape: Iterable[int], offset: int) -> dict[str, Any]:
    shape = list(shape)
    size = torch.Size(shape).numel() * dtype.itemsize
    return {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [offset, offset + size]}
