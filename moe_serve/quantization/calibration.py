"""What experts are given to compute with, on calibration text: the mean square of every input of every matrix.

The model runs as it is served; a recorder stands between its MoE layers and its experts.

Shape alphabet: T tokens, H hidden, I intermediate, K choices per token.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from expert_cache.running.regroup import regroup
from expert_cache.storage.store import ExpertStore, ExpertWeights
from moe_serve.config import EngineConfig
from moe_serve.engine.engine import Engine
from moe_serve.engine.runner_loading import load_runner
from moe_serve.errors import ConfigError
from moe_serve.hf.experts import RunsExperts, connect
from moe_serve.scheduling.sequence import Request, SamplingParams
from moe_serve.text.tokenizer import Tokenizer
from moe_serve_kernels.cpu.expert_mlp import Activation, activate, as_tensor
from predictors.shape import MoELayer

WINDOW_TOKENS = 512
PRIOR_TOKENS = 32
"""How many tokens' worth the layer's average counts in an expert that saw few or none."""


@dataclass(slots=True)
class _Sums:
    tokens: int
    hidden: torch.Tensor
    """[H] sum of squares of what gate and up read."""
    inner: torch.Tensor
    """[I] of what down reads."""


class ActivationRecorder:
    """Stands before a model's experts and remembers the squares of their inputs."""

    def __init__(self, experts: RunsExperts, store: ExpertStore, activation: Activation) -> None:
        self._experts = experts
        self._store = store
        self._activation = activation
        self._sums: dict[tuple[int, int], _Sums] = {}
        """By (decoder layer, expert)."""

    def run(self, layer: MoELayer, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """As Experts.run."""
        groups, decoder_layer = regroup(ids, self._store.num_experts), self._store.decoder_layer(layer)
        for expert in groups.experts:
            start, end = groups.segments[expert]
            x = hidden[groups.tokens[start:end]].float()
            self._add((decoder_layer, expert), x, self._store.weights(layer, expert))
        return self._experts.run(layer, hidden, ids, weights)

    def _add(self, key: tuple[int, int], x: torch.Tensor, weights: ExpertWeights) -> None:
        gate = torch.nn.functional.linear(x, as_tensor(weights.gate, x.dtype), _bias(weights.gate_bias))
        up = torch.nn.functional.linear(x, as_tensor(weights.up, x.dtype), _bias(weights.up_bias))
        inner = activate(self._activation, gate, up).square().sum(0)
        old = self._sums.get(key) or _Sums(0, torch.zeros(x.shape[1]), torch.zeros(inner.shape[0]))
        self._sums[key] = _Sums(len(x) + old.tokens, old.hidden + x.square().sum(0), old.inner + inner)

    def importance(self, decoder_layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean squares ([H] of gate's and up's inputs, [I] of down's) of an expert, drawn towards its layer's."""
        all_sums = [sums for (at, _), sums in self._sums.items() if at == decoder_layer]
        total = sum(sums.tokens for sums in all_sums)
        mean = [torch.stack([getattr(s, name) for s in all_sums]).sum(0) / total for name in ("hidden", "inner")]
        own = self._sums.get((decoder_layer, expert)) or _Sums(0, torch.zeros_like(mean[0]), torch.zeros_like(mean[1]))
        tokens = own.tokens + PRIOR_TOKENS
        return (own.hidden + PRIOR_TOKENS * mean[0]) / tokens, (own.inner + PRIOR_TOKENS * mean[1]) / tokens


def _bias(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.float()


def record(model: str, text: str, most_tokens: int) -> ActivationRecorder:
    """Run the first `most_tokens` tokens of `text` through the model. ConfigError if there are none."""
    settings = {"model": model, "enable_prefix_caching": False, "max_model_len": WINDOW_TOKENS + 1}
    # The recorder stands in the model's modules, so steps must run through them.
    config = EngineConfig.from_dict(settings | {"dtype": "float32", "device": "cpu", "enforce_eager": True})
    tokenizer = Tokenizer.from_path(model)
    ids = tokenizer.encode(text)[:most_tokens]
    if not ids:
        raise ConfigError("--calibration: the file has no text")
    runner = load_runner(config, frozenset())
    loaded = runner.loaded
    recorder = ActivationRecorder(runner.experts, loaded.store, loaded.family.activation(loaded.hf_config))
    connect(runner.model, recorder)
    engine = Engine(runner, tokenizer, runner.spec, frozenset())
    try:
        _run(engine, _windows(ids))
    finally:
        engine.close()
    return recorder


def _run(engine: Engine, prompts: Sequence[Sequence[int]]) -> None:
    """One token after each prompt. MoEServeError where a prompt fails."""
    for i, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=1, temperature=0)
        engine.add_request(Request(f"calibration-{i}", tuple(prompt), params, time.monotonic()))
    while engine.has_work():
        for output in engine.step():
            if output.error is not None:
                raise output.error


def _windows(ids: Sequence[int]) -> list[Sequence[int]]:
    return [ids[i : i + WINDOW_TOKENS] for i in range(0, len(ids), WINDOW_TOKENS)]
