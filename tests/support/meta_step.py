"""A GPU's step without a GPU: a model of full size on tensors without memory, with every launch noted.

Torch's operations and Triton's launches are counted; so are the bytes that the step itself keeps alive at a time, and
whatever comes from the host: tensors on the CPU and copies of them. What the step computes is never known.
A composite operation of torch (softmax, SDPA) counts as one launch, although a GPU may run several kernels for it.

Shape alphabet: T tokens, K choices, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from expert_cache.running.experts import PaddingRows
from expert_cache.running.usage import RouteBuffer
from moe_serve.config import EngineConfig
from moe_serve.engine.model_runner import ModelRunner
from moe_serve.execution import forward_batch
from moe_serve.execution.decode_graphs import StepInputs, widths_up_to
from moe_serve.hf import attention, loading, rope
from moe_serve.hf.dense_loading import model_class_of
from moe_serve.hf.experts import find_experts, replacing
from moe_serve.hf.family import family_of
from moe_serve.hf.loading import LoadedModel
from moe_serve.scheduling.batch_plan import BatchPlan, ScheduledSequence
from moe_serve.spec import ModelSpec
from moe_serve_kernels.gpu import moe_layer
from moe_serve_kernels.gpu.pool import ExpertPool, empty_bank

META = torch.device("meta")
PAGE_SIZE = 16
ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
VIEWS = {
    *("view", "_unsafe_view", "view_as", "reshape", "flatten", "unflatten", "transpose", "movedim", "t", "permute"),
    *("expand", "slice", "narrow", "select", "squeeze", "unsqueeze", "diagonal", "alias", "detach", "as_strided"),
    *("split", "split_with_sizes", "tensor_split", "unbind", "chunk"),
}
"""Operations that launch nothing."""


@dataclass
class Noted:
    """What one step did."""

    operations: Counter[str] = field(default_factory=Counter)
    """Launches of torch, by operation."""
    kernels: Counter[str] = field(default_factory=Counter)
    """Launches of Triton, by kernel."""
    peak_bytes: int = 0
    peak_at: str = ""
    """The operation and shape that reached the peak."""
    from_host: list[str] = field(default_factory=list)
    """Operations that made or took a tensor on the CPU."""

    @property
    def launches(self) -> int:
        return self.operations.total() + self.kernels.total()


class Note(TorchDispatchMode):
    """Counts while it is on."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.noted = Noted()
        self._alive: dict[int, int] = {}
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        before = _tensors((args, kwargs))
        out = func(*args, **(kwargs or {}))
        made = _tensors(out)
        if any(t.device.type == "cpu" for t in before + made):
            self.noted.from_host.append(name)
        self._follow(name, before, made)
        is_filling = "out" in (kwargs or {})
        if any(t.device == META for t in before + made) and (is_filling or _launches(name, before, made)):
            self.noted.operations[name] += 1
        return out

    def _follow(self, name: str, before: list[torch.Tensor], made: list[torch.Tensor]) -> None:
        """Memory of tensors that were not there before, until nothing refers to it any more."""
        old = {_storage(t)._cdata for t in before}
        for tensor in made:
            storage = _storage(tensor)
            key = storage._cdata
            if tensor.device == META and key not in old and key not in self._alive:
                self._alive[key] = storage.nbytes()
                weakref.finalize(storage, self._alive.pop, key, None)
                self._at(name, tensor)

    def _at(self, name: str, tensor: torch.Tensor) -> None:
        total = sum(self._alive.values())
        if total > self.noted.peak_bytes:
            self.noted.peak_bytes, self.noted.peak_at = total, f"{name} {tuple(tensor.shape)}"

    def launch(self, function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        """In the place of a Triton kernel's launch."""
        self.noted.kernels[function.__name__] += 1
        if any(t.device != META for t in _tensors((args, kwargs))):
            self.noted.from_host.append(function.__name__)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> Any:
    return tensor.untyped_storage()


def _launches(name: str, before: list[torch.Tensor], made: list[torch.Tensor]) -> bool:
    if name in VIEWS | ALLOCATIONS:
        return False
    old = {_storage(t)._cdata for t in before}
    return not made or name.endswith("_") or any(_storage(t)._cdata not in old for t in made)


class MetaExperts:
    """All experts resident, in bf16; one pool without memory stands for every layer's."""

    def __init__(self, num_experts: int, hidden: int, inner: int, with_bias: bool, activation: Any) -> None:
        gate_up, down = (
            empty_bank(num_experts, shape, "plain", torch.bfloat16, META, with_bias=with_bias)
            for shape in ((2, inner, hidden), (hidden, inner))
        )
        self.padding = PaddingRows()
        self.routes = RouteBuffer(1, num_experts)
        self._pool = ExpertPool(gate_up, down)
        self._slot_of = torch.empty(num_experts, dtype=torch.int32, device=META)
        self._activation = activation

    def in_place(self) -> None:
        """The CPU's kernels run nothing here."""

    def run(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, meanwhile: Any = None
    ) -> torch.Tensor:
        """As ResidentExperts."""
        if meanwhile is not None:
            meanwhile()
        chosen = self.padding.leave_out(ids)
        return moe_layer.moe_layer(hidden, chosen, weights, self._slot_of, self._pool, self._activation)

    def close(self) -> None:
        """There are no threads."""


class MetaModel:
    """One model as a GPU would run it, on meta tensors."""

    def __init__(self, config: Any, num_pages: int) -> None:
        """`config`: a transformers config; only its shape counts."""
        with _as_if_on_a_gpu(Note()), torch.inference_mode():
            self.runner = _runner(config, num_pages)

    def step(self, num_seqs: int, context: int, new_tokens: int) -> Noted:
        """What a step does in which each sequence computes its last `new_tokens` of `context`."""
        plan, limits = _plan(num_seqs, context, new_tokens), self.runner._group_limits
        return self._noted(forward_batch.make(plan, PAGE_SIZE, META, limits))

    def _noted(self, batch: forward_batch.ForwardBatch) -> Noted:
        note = Note()
        with _as_if_on_a_gpu(note), torch.inference_mode(), note:
            logits = self.runner._forward(batch)
            assert logits.shape[0] == len(batch.sample_rows)
        return note.noted

    def graph(self, num_seqs: int) -> Noted:
        """What a graph holds that decodes `num_seqs` sequences of any length."""
        width = widths_up_to(self.runner.spec.max_position_embeddings, PAGE_SIZE)[-1]
        inputs = StepInputs(num_seqs, width, PAGE_SIZE, spare_page=0, device=META)
        return self._noted(inputs.batch(num_seqs, width))

    def close(self) -> None:
        """Ends the runner's thread."""
        self.runner.masks.close()


def _runner(config: Any, num_pages: int) -> ModelRunner:
    family, spec = family_of(config), ModelSpec.from_hf(config)
    kv_shapes, state_shapes = loading.shapes_of(config)
    attention.register()
    with replacing(family.experts_class), META:
        model = model_class_of(config, family)._from_config(
            config, attn_implementation=attention.NAME, dtype=torch.bfloat16
        )
    for name, buffer in list(model.named_buffers()):  # those that transformers computes on the CPU
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner)._buffers[last] = buffer.to(META)
    loading._adapt(model, config, family)
    if family.tabulates_rotary:
        rope.tabulate(model, spec.max_position_embeddings, META)
    store: Any = SimpleNamespace(layers=range(len(find_experts(model))))
    loaded = LoadedModel(model.eval(), config, family, store, kv_shapes, state_shapes)
    experts: Any = MetaExperts(
        spec.num_experts,
        spec.expert_hidden_size,
        spec.expert_intermediate_size,
        config.model_type == "gpt_oss",
        family.activation(config),
    )
    engine = EngineConfig.from_dict(
        {
            "model": "any",
            "dtype": "bfloat16",
            "num_kv_pages": num_pages,
            "max_model_len": spec.max_position_embeddings,
        }
    )
    object.__setattr__(engine, "device", "meta")  # which no user may ask for
    runner = ModelRunner(engine, loaded, spec, frozenset(), experts)
    runner.run_whole_steps()
    return runner


def _plan(num_seqs: int, context: int, new_tokens: int) -> BatchPlan:
    pages = -(-context // PAGE_SIZE)
    items = []
    for n in range(num_seqs):
        seq: Any = SimpleNamespace(
            token_ids=[0] * context,
            page_ids=list(range(n * pages, (n + 1) * pages)),
            num_tokens=context,
            num_unscored=0,
            seat=-1,
        )
        items.append(ScheduledSequence(seq, context - new_tokens, new_tokens))
    return BatchPlan(tuple(items))


@contextmanager
def _as_if_on_a_gpu(note: Note) -> Iterator[None]:
    """The kernels of the GPU are taken, and noted; transformers leaves out what a capture does not allow."""
    with ExitStack() as patches:
        for name in ("moe_serve_kernels.gpu.is_available", "moe_serve_kernels.gpu.paged_attention._gpu_is_available"):
            patches.enter_context(mock.patch(name, lambda device: device == META))
        patches.enter_context(mock.patch("torch.cuda.is_current_stream_capturing", return_value=True))
        patches.enter_context(mock.patch.object(JITFunction, "run", lambda *args, **kw: note.launch(*args, **kw)))
        yield
