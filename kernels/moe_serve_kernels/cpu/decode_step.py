"""A decoding step of a few sequences on the CPU as one call: attention, routing and experts of all layers.

Between the short layers of one token, waking threads and asking Python what comes next take longer than reading the
weights. Here one team of threads runs the whole step, or each layer up to its experts if the caller runs those.
Float32 activations on weights as they are stored. (llama.cpp's graphs on CPUs; CUDA graphs on GPUs.)

Shape alphabet: T tokens (one per sequence), H hidden, K choices, V vocabulary, L layers with a router.
"""

from __future__ import annotations

import ctypes

import torch

from moe_serve_kernels.cpu import library
from moe_serve_kernels.cpu.decoder import DecodeInputs
from moe_serve_kernels.cpu.library import native
from moe_serve_kernels.cpu.native_model import NativeModel


class DecodeStep:
    """One model's layers, ready to be run for at most `most_tokens()` tokens."""

    def __init__(self, model: NativeModel) -> None:
        self._native = native()
        self._model = model
        self._most_threads = torch.get_num_threads()
        self._memory = self._new_memory()
        self._outputs = [_Outputs(model, num_tokens) for num_tokens in range(1, most_tokens() + 1)]

    def _new_memory(self) -> torch.Tensor:
        return torch.empty(self._native.moe_serve_decode_memory(self._model.address, most_tokens(), self._most_threads))

    @property
    def _num_threads(self) -> int:
        """Of torch, at most as many as there were at first."""
        return min(torch.get_num_threads(), self._most_threads)

    def run(self, inputs: DecodeInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The whole step: logits [T, V], chosen experts [L, T, K] int64 and their weights [L, T, K].

        All three are overwritten by the next step of as many tokens.
        """
        outputs, step = self._step(inputs)
        self._native.moe_serve_decode_step(self._model.address, step, self._memory.data_ptr(), self._num_threads)
        return outputs.logits, outputs.ids, outputs.weights

    def until_experts(self, block: int, inputs: DecodeInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One layer up to its experts: their input [T, H], and ids and weights [T, K].

        `shared`, then adding residual_scale times what the experts make of that to `inputs.x`, completes the layer.
        Without a router it is complete, and what is returned means nothing.
        """
        outputs, step = self._step(inputs)
        memory, threads = self._memory.data_ptr(), self._num_threads
        self._native.moe_serve_decode_until_experts(self._model.address, step, block, memory, threads)
        route = min(self._model.routes[block], len(outputs.ids) - 1)
        return outputs.normed, outputs.ids[route], outputs.weights[route]

    def shared(self, block: int, inputs: DecodeInputs) -> None:
        """The shared expert's part of a layer that `until_experts` has begun, if it has one: while others are read."""
        if self._model.blocks[block].shared is not None:
            _, step = self._step(inputs)
            memory, threads = self._memory.data_ptr(), self._num_threads
            self._native.moe_serve_decode_shared(self._model.address, step, block, memory, threads)

    def head(self, inputs: DecodeInputs) -> torch.Tensor:
        """Logits [T, V] of `inputs.x`; overwritten by the next step of as many tokens."""
        outputs, step = self._step(inputs)
        self._native.moe_serve_decode_head(self._model.address, step, self._memory.data_ptr(), self._num_threads)
        return outputs.logits

    def _step(self, inputs: DecodeInputs) -> tuple[_Outputs, int]:
        count, hidden = inputs.x.shape
        assert 0 < count <= len(self._outputs)
        assert len(inputs.page_table) == count
        assert hidden == self._model.shape.hidden
        assert inputs.x.dtype == inputs.cos.dtype == inputs.sin.dtype == torch.float32
        tensors = (inputs.x, inputs.cos, inputs.sin, inputs.kv_slots, inputs.page_table, inputs.lengths)
        assert all(tensor.is_contiguous() for tensor in tensors)
        outputs = self._outputs[count - 1]
        step = outputs.step
        step.cos, step.sin = inputs.cos.data_ptr(), inputs.sin.data_ptr()
        step.kv_slots, step.lengths = inputs.kv_slots.data_ptr(), inputs.lengths.data_ptr()
        step.page_table, step.table_width = inputs.page_table.data_ptr(), inputs.page_table.shape[1]
        step.x = inputs.x.data_ptr()
        return outputs, ctypes.addressof(step)


class _Outputs:
    """The memory for the results of a step of `num_tokens` tokens."""

    def __init__(self, model: NativeModel, num_tokens: int) -> None:
        num_routes, top_k = model.routes[-1], model.shape.routing.top_k
        self.normed = torch.empty(num_tokens, model.shape.hidden)
        self.ids = torch.empty(num_routes, num_tokens, top_k, dtype=torch.int64)
        self.weights = torch.empty(num_routes, num_tokens, top_k)
        self.logits = torch.empty(num_tokens, model.head.num_rows)
        outputs = {name: getattr(self, name).data_ptr() for name in ("normed", "ids", "weights", "logits")}
        inputs = dict.fromkeys(("cos", "sin", "kv_slots", "starts", "page_table", "lengths", "x"))
        self.step = native().new(
            "Step", num_tokens=num_tokens, num_sequences=num_tokens, table_width=0, **inputs, **outputs
        )


def is_available(device: torch.device, dtype: torch.dtype) -> bool:
    """True when a `DecodeStep` can run here. bfloat16: keys and values in bf16, and what meets bf16 weights rounded to
    it; the residual stream, softmax and all sums are float32."""
    return device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and library.load() is not None


def most_tokens() -> int:
    """Of one step: with more, weights are no longer all that takes time."""
    return native().value("STREAM_MAX_TOKENS")
