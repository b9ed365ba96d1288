"""Distilling a model's routers into one small router: the training of `pregate`.

Shape alphabet: N tokens, B tokens of a batch, R width, V vocabulary, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from predictors.averages import past_averages
from predictors.context import RATES
from predictors.methods.pregate.layout import SHORT, WIDTH
from predictors.predictor import Training
from predictors.streams import UNKNOWN, multi_hot
from predictors.trace import RoutingTrace

MAX_STEPS = 2000
MAX_EPOCHS = 25
BATCH = 256
LEARNING_RATE = 4e-3
WEIGHT_DECAY = 1e-2
DROPOUT = 0.1


def train(training: Training) -> dict[str, npt.NDArray[Any]]:
    """The arrays of `Pregate`. The same seed gives the same arrays; torch's global generator is left alone."""
    trace = training.trace
    rows = _Rows(trace)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(training.seed)
        net = _Net(trace, rows.vocabulary)
        _run(net, rows, trace.num_tokens)
    return {name: p.detach().numpy().copy() for name, p in net.named_arrays()}


def _run(net: _Net, rows: _Rows, num_tokens: int) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = max(1, min(MAX_STEPS, MAX_EPOCHS * num_tokens // BATCH))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps + 1)
    for batch in _batches(num_tokens, steps):
        cells, averages, tokens, used = rows.batch(batch)
        likely = net(cells, averages, tokens).log_softmax(dim=-1)
        loss = -(likely * used).sum(dim=-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _batches(num_tokens: int, steps: int) -> Iterator[npt.NDArray[np.int64]]:
    for _ in range(steps):
        yield torch.randint(num_tokens, (min(BATCH, num_tokens),)).numpy()


class _Rows:
    """A trace's tokens with what is known before each."""

    def __init__(self, trace: RoutingTrace) -> None:
        self._experts = trace.num_experts
        self._ids = trace.ids.astype(np.int64)
        self._first = np.zeros(trace.num_tokens, dtype=bool)
        self._first[trace.seq_offsets[:-1]] = True
        self._first_expert = np.arange(trace.num_layers)[:, None] * trace.num_experts
        self._averages = np.stack([past_averages(trace, rate) for rate in RATES], axis=1)
        self._tokens = trace.token_ids
        self.vocabulary = 0 if trace.token_ids is None else int(trace.token_ids.max()) + 1

    def batch(self, rows: npt.NDArray[np.int64]) -> tuple[torch.Tensor, ...]:
        """cells [B, L K] of the token before, averages [B, rates, L E], tokens [B, 2], used [B, L, E]; unknown ids
        are the one after the last."""
        cells = (self._ids[rows - 1] + self._first_expert).reshape(len(rows), -1)
        cells[self._first[rows]] = self._ids.shape[1] * self._experts
        averages = self._averages[rows].reshape(len(rows), len(RATES), -1)
        used = multi_hot(self._ids[rows], self._experts)
        tokens = self._token_pairs(rows)
        return tuple(torch.from_numpy(array) for array in (cells, averages, tokens, used))

    def _token_pairs(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        pairs = np.full((len(rows), 2), UNKNOWN, dtype=np.int64)
        if self._tokens is not None:
            pairs[:, 0] = self._tokens[rows]
            pairs[:, 1] = np.where(self._first[rows], UNKNOWN, self._tokens[rows - 1])
        pairs[pairs == UNKNOWN] = self.vocabulary
        return pairs


class _Net(nn.Module):
    """`Pregate` in torch, with parameters of the same names and shapes; last rows of tables stay 0."""

    def __init__(self, trace: RoutingTrace, vocabulary: int) -> None:
        super().__init__()
        self._shape = (trace.num_layers, trace.num_experts)
        cells = trace.num_layers * trace.num_experts
        self.routes = nn.EmbeddingBag(cells + 1, WIDTH, mode="sum", padding_idx=cells)
        self.token = nn.Embedding(vocabulary + 1, WIDTH, padding_idx=vocabulary)
        self.last_token = nn.Embedding(vocabulary + 1, WIDTH, padding_idx=vocabulary)
        for table in (self.routes, self.token, self.last_token):
            nn.init.normal_(table.weight, std=0.05)
            nn.init.zeros_(table.weight[table.padding_idx or 0])
        self.averages = nn.Parameter(0.05 * torch.randn(cells, WIDTH))
        self.out = nn.Parameter(0.05 * torch.randn(WIDTH, cells))
        popularity = torch.from_numpy(trace.popularity()).float()
        self.bias = nn.Parameter((popularity + 1e-3).log().reshape(-1))
        self.habit = nn.Parameter(torch.ones(len(RATES), cells))
        self._dropout = nn.Dropout(DROPOUT)

    def forward(self, cells: torch.Tensor, averages: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        h = self.routes(cells) + averages[:, SHORT] @ self.averages
        h = h + self.token(tokens[:, 0]) + self.last_token(tokens[:, 1])
        h = self._dropout(nn.functional.silu(h))
        scores = h @ self.out + self.bias + (averages * self.habit).sum(dim=1)
        shaped: torch.Tensor = scores.view(-1, *self._shape)
        return shaped

    def named_arrays(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.named_parameters():
            yield name.removesuffix(".weight"), parameter
