"""Conventional expert parallelism: in every MoE layer tokens go to their experts' ranks and partial sums come back.

Each sequence has a home rank, which computes everything but the experts of other ranks. A token goes once to each
rank, however many of its choices are there, and one partial sum comes back from each. Knows plans, the model and the
layer call that Hugging Face's blocks make; knows no sockets.

Shape alphabet: T tokens, V visiting tokens of other ranks, K choices, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from expert_cache.running.experts import Work, nothing
from moe_serve.engine.model_runner import ModelRunner
from moe_serve.hf.experts import connect
from moe_serve.parallel.modes.exchange import pack, unpack
from moe_serve.parallel.modes.expert_share import ExpertShare, SharedExperts, share_of
from moe_serve.parallel.modes.route_pieces import begin_step, piece
from moe_serve.parallel.modes.runner import Outcome, RankStep
from moe_serve.scheduling.batch_plan import BatchPlan
from predictors.shape import MoELayer


class ConventionalExperts(SharedExperts):
    """Experts over ranks; every rank must call `run` or `join` for each MoE layer of a step."""

    def join(self, layer: MoELayer) -> None:
        """Take part in a layer without a token of our own."""
        self.run(layer, *self.shared.no_tokens())

    def run(
        self, layer: MoELayer, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, meanwhile: Work = nothing
    ) -> torch.Tensor:
        """See Experts."""
        self.routes.add(ids, weights)
        meanwhile()
        shared, exchange = self.shared, self.shared.exchange
        weights = weights.to(torch.float32)
        ranks = shared.ownership.choose(layer, ids)
        shared.count(layer, ranks, exchange.rank)
        ours = hidden, share_of(ids, ranks, exchange.rank), weights
        rows_for = {r: (ranks == r).any(1).nonzero()[:, 0] for r in exchange.others}
        leaving = {
            r: pack(hidden[n], share_of(ids, ranks, r)[n].short(), weights[n]).flatten() for r, n in rows_for.items()
        }
        exchange.book(layer, "dispatch", sum(map(len, leaving.values())))
        visitors = exchange.trade(layer, leaving, exchange.others)
        partial, answers = self._answer(layer, ours, visitors)
        exchange.book(layer, "combine", sum(map(len, answers.values())))
        back = exchange.trade(layer, answers, [r for r, rows in rows_for.items() if len(rows)])
        return self._sum(partial, rows_for, back).to(hidden.dtype)

    def _answer(
        self,
        layer: MoELayer,
        own: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        visitors: Mapping[int, torch.Tensor],
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Own and visiting tokens through this rank's experts: partial sums of the own, and messages for the others."""
        top_k = own[1].shape[1]
        columns = (own[0].shape[1], own[0].dtype), (top_k, torch.int16), (top_k, torch.float32)
        unpacked = {r: unpack(raw, *columns) for r, raw in visitors.items() if len(raw)}
        theirs = [(hidden, ids.long(), weights) for hidden, ids, weights in unpacked.values()]
        everyone = [torch.cat(column) for column in zip(own, *theirs, strict=True)]
        num_own = len(own[0])
        partial = self.shared.run_share(layer, everyone[0], everyone[1], everyone[2], self.losses, num_own)
        answers = torch.split(partial[num_own:], [len(hidden) for hidden, _, _ in theirs])
        return partial[:num_own], {r: pack(part).flatten() for r, part in zip(unpacked, answers, strict=True)}

    def _sum(
        self, total: torch.Tensor, rows_for: Mapping[int, torch.Tensor], back: Mapping[int, torch.Tensor]
    ) -> torch.Tensor:
        """Own partial sums [T, H] and those that came back."""
        for rank, raw in sorted(back.items()):
            (theirs,) = unpack(raw, (total.shape[1], total.dtype))
            self.losses.note(rows_for[rank], theirs, rank)
            total = total.index_add(0, rows_for[rank], theirs)
        return total


class ConventionalRunner:
    """Each sequence's tokens are computed on its home; only experts are elsewhere."""

    def __init__(self, runner: ModelRunner, shared: ExpertShare) -> None:
        self._runner = runner
        self._experts = runner.experts = ConventionalExperts(shared)
        self._rank = shared.exchange.rank
        connect(runner.model, self._experts)

    def run(self, step: RankStep) -> Outcome:
        own = step.part_of(self._rank)
        begin_step(self._experts.routes, step.routes, has_rows=bool(own))
        if not own:
            for layer in self._experts.shared.local.store.layers:
                self._experts.join(layer)
            return Outcome({}, {}, None)
        plan = BatchPlan(tuple(step.plan.scheduled[i] for i in own))
        result = self._runner.run(plan)
        sampled = [i for i in own if step.plan.scheduled[i].needs_sample]
        tokens = dict(zip(sampled, zip(result.token_ids, result.logprobs, strict=True), strict=True))
        errors = {i: result.errors[s.seq] for i in own if (s := step.plan.scheduled[i]).seq in result.errors}
        late = tuple(i for i in own if step.plan.scheduled[i].seq in result.late)
        routes = None if result.routes is None else piece(step.plan, own, result.routes.ids, result.routes.weights)
        return Outcome(tokens, errors, routes, late)
