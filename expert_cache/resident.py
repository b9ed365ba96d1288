"""ResidentExperts: the compute-ready experts that a memory budget allows.

First come, first kept: an expert's form is built when it is first used and stays. When the budget
is spent, further experts run straight from the memory-mapped checkpoint, with the same result.
Eviction policies are the next layer's business (issue "Expert cache and offload mode").
"""

from __future__ import annotations

import torch

from expert_cache import forms
from expert_cache.activations import Gate
from expert_cache.forms import ExpertForm, FormRules
from expert_cache.store import ExpertStore


class ResidentExperts:
    """Forms by (layer, expert), within `budget_bytes` of anonymous memory."""

    def __init__(
        self,
        store: ExpertStore,
        gate: Gate,
        rules: FormRules,
        dtype: torch.dtype,
        device: torch.device,
        budget_bytes: int,
    ) -> None:
        self.store = store
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self.num_hits = 0
        self.num_misses = 0
        self._gate = gate
        self._rules = rules
        self._dtype = dtype
        self._device = device
        self._forms: dict[tuple[int, int, str], ExpertForm] = {}
        self._in_elements = 2 * store.weights(store.layers[0], 0).gate.numel()
        self._rows_are_free = rows_are_free(store, dtype, device, budget_bytes)

    def get(self, layer: int, expert: int, num_tokens: int) -> ExpertForm:
        """A form of the expert that can run `num_tokens` tokens."""
        name = self._rules.choose(self._in_elements, num_tokens, self._rows_are_free)
        form = self._forms.get((layer, expert, name))
        if form is not None:
            self.num_hits += 1
            return form
        self.num_misses += 1
        return self._admit(layer, expert, name)

    def _admit(self, layer: int, expert: int, name: str) -> ExpertForm:
        """Build and keep the wanted form, or run from the mapping when it does not fit."""
        weights = self.store.weights(layer, expert)
        cost = weights.num_elements * self._dtype.itemsize
        is_view = name == "rows" and forms.rows_are_views(weights, self._dtype, self._device)
        if not is_view and self.used_bytes + cost > self.budget_bytes:
            return forms.build("rows", weights, self._gate, self._dtype, self._device)
        form = forms.build(name, weights, self._gate, self._dtype, self._device)
        self._forms[layer, expert, name] = form
        self.used_bytes += form.num_bytes
        return form

    @property
    def num_resident(self) -> int:
        """Distinct experts with a compute-ready form."""
        return len({(layer, expert) for layer, expert, _ in self._forms})

    def check_integrity(self) -> None:
        """Prove the byte count; AssertionError if it drifted or exceeds the budget."""
        assert self.used_bytes == sum(f.num_bytes for f in self._forms.values()), "byte count drifted"
        assert self.used_bytes <= self.budget_bytes, "budget exceeded"


def rows_are_free(store: ExpertStore, dtype: torch.dtype, device: torch.device, budget_bytes: int) -> bool:
    """True when the `rows` form is a view, or the budget holds two forms of every expert."""
    if forms.rows_are_views(store.weights(store.layers[0], 0), dtype, device):
        return True
    return budget_bytes >= 2 * store.num_total * store.expert_elements * dtype.itemsize


def bytes_for_everything(store: ExpertStore, rules: FormRules, dtype: torch.dtype, device: torch.device) -> int:
    """Anonymous bytes that hold every form the rules can ask for, of every expert."""
    in_elements = 2 * store.weights(store.layers[0], 0).gate.numel()
    is_view = forms.rows_are_views(store.weights(store.layers[0], 0), dtype, device)
    names = rules.names(in_elements, rows_are_free=True) - ({"rows"} if is_view else set())
    return len(names) * store.num_total * store.expert_elements * dtype.itemsize
