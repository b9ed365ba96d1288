"""ExpertStore: where every expert's weights lie in the checkpoint's files.

The cold tier. It answers in two ways: `weights` gives views of the memory-mapped file, which cost
no memory of their own, and `reads` says which runs of bytes to read so that the same views can be
made over other memory (`assemble`). Whatever layout the checkpoint has, nothing is converted.
Knows nothing of caching or of Hugging Face names.

Shape alphabet: E experts per layer, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch

from expert_cache.storage.direct_io import BLOCK_BYTES, aligned_span
from expert_cache.storage.encoding import ROLES, Encoding, Matrix
from moe_serve_kernels.cpu.coded import CodedRows
from moe_serve_kernels.quantized import BlockRows, QuantizedRows
from predictors.shape import Key, MoELayer


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One expert as stored: views, possibly strided, in the checkpoint's dtype or quantised.

    gate, up [I, H]; down [H, I]; biases [I], [I], [H] or all None.
    """

    gate: Matrix
    up: Matrix
    down: Matrix
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None


def matrices_of(weights: ExpertWeights) -> tuple[Matrix, Matrix, Matrix]:
    """Gate, up and down."""
    return weights.gate, weights.up, weights.down


@dataclass(frozen=True, slots=True)
class FusedLayout:
    """How a fused gate_up tensor holds its halves (see moe_serve.hf.family.Family)."""

    transposed: bool = False
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of the checkpoint: a view of the mapped file, and where its bytes are."""

    name: str
    tensor: torch.Tensor
    file: Path
    offset: int
    """Bytes from the start of the file; the tensor's bytes are contiguous."""
    block_type: str | None = None
    """Of a tensor in ggml's blocks, whose rows are bytes: their type (moe_serve_kernels.quantized)."""

    def expert(self, index: int) -> StoredTensor:
        """One expert of a tensor whose first dimension counts experts."""
        part = self.tensor[index]
        offset = self.offset + index * part.nbytes
        return StoredTensor(f"{self.name}[{index}]", part, self.file, offset, self.block_type)


@dataclass(frozen=True, slots=True)
class Read:
    """One run of consecutive bytes, and the tensors in it.

    Example: an expert with gate at bytes 4200..5200 and up at 5200..6200 of a file is one Read:
    offset 4200, num_bytes 2000. In the expert's memory, block-aligned, it starts at `memory_offset`,
    0 say, with the 104 bytes that come before it in its first block: gate is at 104, up at 1104.
    """

    file: Path
    offset: int
    num_bytes: int
    memory_offset: int
    """Where the run's first block goes; a multiple of BLOCK_BYTES."""
    tensors: tuple[tuple[str, StoredTensor], ...]
    """(part, tensor) in file order."""

    @property
    def span(self) -> tuple[int, int]:
        """(offset, length) in the file of the blocks that hold the run."""
        return aligned_span(self.offset, self.num_bytes)

    @property
    def names(self) -> str:
        return ", ".join(t.name for _, t in self.tensors)


AnyMatrix = TypeVar("AnyMatrix", torch.Tensor, torch.Tensor | QuantizedRows | BlockRows)


def part_name(part: str, role: str) -> str:
    """The part that holds a quantised matrix's tensor of a role (ROLES)."""
    return part if role == "codes" else f"{part}_{role}"


LayerTensors = Mapping[tuple[str, int | None], StoredTensor]
"""(part, expert) -> 2-D tensor, or (part, None) -> 3-D tensor with the expert dimension first."""


class ExpertStore:
    """Expert weights by (MoE layer, expert). The one place that knows which decoder layer a MoE layer is.

    Parts are gate, up, down, gate_up, gate_up_bias, down_bias, gate_bias, up_bias. A quantised matrix is several:
    gate its codes, gate_scale, gate_zero, gate_order (see Encoding), and so on. A bf16 matrix in 12-bit codes is gate,
    gate_exponents and gate_rare (see CodedRows).
    """

    def __init__(
        self,
        tensors: Mapping[int, LayerTensors],
        num_experts: int,
        fused: FusedLayout | None = None,
        checksums: Mapping[tuple[int, int], str] | None = None,
        encoding: Encoding | None = None,
        shape: tuple[int, int] = (0, 0),
    ) -> None:
        """`tensors` and `checksums`: by decoder layer. `encoding`: of matrices that have scales. `shape`: an expert's
        (I, H); needed with an encoding, and for matrices in blocks or 12-bit codes. `checksums`: xxh3-64 of an
        expert's bytes in file order, in hexadecimal; only expert files carry them."""
        self.decoder_layers = tuple(sorted(tensors))
        """Those with experts, in order: each MoE layer's index in the checkpoint."""
        self.layers = tuple(MoELayer(i) for i in range(len(self.decoder_layers)))
        self.num_experts = num_experts
        self._parts = [_by_expert(tensors[layer], num_experts) for layer in self.decoder_layers]
        self._checksums = checksums or {}
        self._reads: dict[Key, tuple[Read, ...]] = {}
        self._fused = fused or FusedLayout()
        self.encoding = encoding
        self.shape = shape

    def decoder_layer(self, layer: MoELayer) -> int:
        """The checkpoint's index of a MoE layer: for errors, reports and metrics."""
        return self.decoder_layers[layer]

    def name(self, layer: MoELayer, expert: int) -> str:
        """What errors call an expert."""
        return f"layer {self.decoder_layer(layer)} expert {expert}"

    def checksum(self, layer: MoELayer, expert: int) -> str | None:
        """xxh3-64 of the expert's bytes in file order, in hexadecimal, where the file carries it."""
        return self._checksums.get((self.decoder_layer(layer), expert))

    def weights(self, layer: MoELayer, expert: int) -> ExpertWeights:
        """Views of one expert's weights in the mapped file; touching them reads it."""
        return self.assemble((layer, expert), {part: t.tensor for part, t in self._parts[layer][expert].items()})

    def reads(self, layer: MoELayer, expert: int) -> tuple[Read, ...]:
        """The runs of bytes that hold an expert, longest possible, in file order."""
        if (layer, expert) not in self._reads:
            self._reads[layer, expert] = self._find_reads(layer, expert)
        return self._reads[layer, expert]

    def _find_reads(self, layer: MoELayer, expert: int) -> tuple[Read, ...]:
        runs: list[list[tuple[str, StoredTensor]]] = []
        for item in sorted(self._parts[layer][expert].items(), key=lambda p: (p[1].file, p[1].offset)):
            if runs and _follows(runs[-1][-1][1], item[1]):
                runs[-1].append(item)
            else:
                runs.append([item])
        return tuple(_place(runs))

    def parts(self, layer: MoELayer, expert: int) -> Mapping[str, StoredTensor]:
        """One expert's tensors as stored."""
        return self._parts[layer][expert]

    @property
    def is_copied(self) -> bool:
        """Experts are not used where they are read, but copied first."""
        return self.encoding is not None and (self.encoding.is_copied or self._has_order)

    @cached_property
    def _has_order(self) -> bool:
        return any(part.endswith("_order") for part in self._parts[0][0])

    def assemble(self, key: Key, parts: Mapping[str, torch.Tensor]) -> ExpertWeights:
        """The weights made of one expert's tensors, wherever those lie."""
        down = self._matrix(key, parts, "down")
        if "gate" in parts:
            gate, up = self._matrix(key, parts, "gate"), self._matrix(key, parts, "up")
            biases = parts.get("gate_bias"), parts.get("up_bias")
        else:
            fused = self._matrix(key, parts, "gate_up")
            assert not isinstance(fused, CodedRows)
            gate, up = (self._half(fused, i) for i in (0, 1))
            bias = parts.get("gate_up_bias")
            biases = (None, None) if bias is None else (self._half(bias, 0), self._half(bias, 1))
        return ExpertWeights(gate, up, down, *biases, parts.get("down_bias"))

    def _matrix(self, key: Key, parts: Mapping[str, torch.Tensor], part: str) -> Matrix:
        """[out, in] view of a stored matrix."""
        columns = self.shape[0] if part == "down" else self.shape[1]
        block_type = self._parts[key[0]][key[1]][part].block_type
        if block_type is not None:
            return BlockRows(block_type, parts[part], columns)
        if f"{part}_exponents" in parts:
            return CodedRows(parts[part], parts[f"{part}_exponents"], parts[f"{part}_rare"], columns)
        if f"{part}_scale" not in parts:
            return parts[part].t() if self._fused.transposed else parts[part]
        assert self.encoding is not None
        tensors = {role: parts[name] for role in ROLES if (name := part_name(part, role)) in parts}
        return self.encoding.matrix(tensors, columns)

    def _half(self, gate_up: AnyMatrix, which: int) -> AnyMatrix:
        """Gate (0) or up (1) of a fused tensor, which has both in its output dimension, the first."""
        half = gate_up.shape[0] // 2
        rows = slice(which, None, 2) if self._fused.interleaved else slice(which * half, (which + 1) * half)
        return gate_up[rows] if isinstance(gate_up, torch.Tensor) else gate_up.rows(rows)

    @cached_property
    def expert_bytes(self) -> int:
        """Bytes of one expert as stored; the mean where they differ, as those of a GGUF file and of codes do."""
        return -(-self.total_bytes // self.num_total)

    @cached_property
    def total_bytes(self) -> int:
        """Bytes of all experts as stored."""
        return sum(self._bytes_of(layer, expert) for layer in self.layers for expert in range(self.num_experts))

    def _bytes_of(self, layer: MoELayer, expert: int) -> int:
        return sum(stored.tensor.nbytes for stored in self._parts[layer][expert].values())

    @cached_property
    def slot_bytes(self) -> int:
        """Memory that holds any one expert as `reads` lays it out."""
        return max(_memory_bytes(self.reads(layer, e)) for layer in self.layers for e in range(self.num_experts))

    @property
    def num_total(self) -> int:
        """Experts over all layers."""
        return len(self.layers) * self.num_experts


def _by_expert(parts: LayerTensors, num_experts: int) -> list[dict[str, StoredTensor]]:
    """One layer's tensors, one dict of parts per expert."""
    experts: list[dict[str, StoredTensor]] = [{} for _ in range(num_experts)]
    for (part, index), tensor in parts.items():
        if index is not None:
            experts[index][part] = tensor
            continue
        for expert in range(num_experts):
            experts[expert][part] = tensor.expert(expert)
    return experts


def _follows(before: StoredTensor, after: StoredTensor) -> bool:
    return after.file == before.file and after.offset == before.offset + before.tensor.nbytes


def _place(runs: Sequence[Sequence[tuple[str, StoredTensor]]]) -> Iterator[Read]:
    memory_offset = 0
    for run in runs:
        first, num_bytes = run[0][1], sum(t.tensor.nbytes for _, t in run)
        read = Read(first.file, first.offset, num_bytes, memory_offset, tuple(run))
        yield read
        memory_offset += read.span[1]


def _memory_bytes(reads: Sequence[Read]) -> int:
    last = reads[-1]
    total = last.memory_offset + last.span[1]
    assert total % BLOCK_BYTES == 0
    return total


def views_in(memory: torch.Tensor, reads: Sequence[Read]) -> dict[str, torch.Tensor]:
    """Part -> tensor over `memory` (uint8, laid out as `reads` says), as the checkpoint stores it."""
    parts = {}
    for read in reads:
        start = read.memory_offset + read.offset - read.span[0]
        for part, stored in read.tensors:
            size = stored.tensor.nbytes
            run = memory[start : start + size]
            if start % stored.tensor.dtype.itemsize:  # where a tensor of single bytes of odd length comes before
                run = run.clone()
            parts[part] = run.view(stored.tensor.dtype).view(stored.tensor.shape)
            start += size
    return parts
