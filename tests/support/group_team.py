"""GroupTeam: a team inside one process group, without a front: for jobs that a launcher starts as a whole.

Rank 0 leads and has the engine; the others follow its steps. Measurements and tests load many models one after
the other this way. A lost rank ends the job.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from moe_serve.hf.checkpoint import read_config
from moe_serve.parallel.config import ParallelConfig
from moe_serve.parallel.expert_plans import read_plan
from moe_serve.parallel.front.engine import ParallelEngine
from moe_serve.parallel.front.prescheduling import Counts, Prescheduler
from moe_serve.parallel.front.team_runner import TeamRunner
from moe_serve.parallel.ranks.worker import Worker
from moe_serve.parallel.wire.channel import Message
from moe_serve.scheduling.sequence import Request, SamplingParams
from moe_serve.spec import ModelSpec
from moe_serve.text.generation_defaults import eos_token_ids
from moe_serve.text.tokenizer import Tokenizer
from placement.cost import hosts_of
from predictors.predictor import RouterShape


class GroupTeam:
    """The part of Team that an engine needs, over the process group."""

    generation = 1

    def __init__(self, worker: Worker, parallel: ParallelConfig) -> None:
        self.parallel = parallel
        self.num_ranks = parallel.devices
        self.counted: dict[int, Message] = {}
        self._worker = worker

    def wait_until_ready(self) -> int:
        return self.generation

    def ask_all(self, message: Message) -> list[Message]:
        """As JSON, because that is what ranks behind sockets would see, and as directly as they would get it."""
        others = range(1, self.num_ranks)
        self._worker.wire.trade(dict.fromkeys(others, _packed(message)), ())
        own = json.loads(json.dumps(self._worker.answer(message)))
        heard = self._worker.wire.trade({}, others)
        answers = [own, *(_read(heard[rank]) for rank in others)]
        if "traffic" in own:
            self.counted = dict(enumerate(answers))
        return answers

    def reports(self) -> tuple[int, dict[int, Message]]:
        """As Team.reports; here the ranks are asked, so not during a step."""
        return self.generation, dict(enumerate(self.ask_all({"op": "report"})))

    def stop(self) -> None:
        """The followers' loops end."""
        self._worker.wire.trade(dict.fromkeys(range(1, self.num_ranks), _packed({"op": "stop"})), ())


def follow(worker: Worker) -> None:
    """The steps of a rank that is not the first, until rank 0 stops."""
    while True:
        message = _read(worker.wire.trade({}, [0])[0])
        if message["op"] == "stop":
            return
        worker.wire.trade({0: _packed(worker.answer(message))}, ())


def _packed(message: Message) -> torch.Tensor:
    """uint8 [n]."""
    return torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)


def _read(raw: torch.Tensor) -> Message:
    message: Message = json.loads(raw.cpu().numpy().tobytes())
    return message


def engine_over(team: Any, worker: Worker, uses: Counts | None = None) -> ParallelEngine:
    """Rank 0's engine. `uses` [V, L, E]: the predictor's table (prescheduling)."""
    config, parallel = worker.config, team.parallel
    spec = ModelSpec.from_hf(read_config(config.model))
    size = parallel.ranks_per_group
    plan = read_plan(parallel.expert_plan, worker.layers, spec.num_experts, size)
    prescheduler = Prescheduler(hosts_of(plan.layout, size), None if uses is None else lambda: uses)
    shape = RouterShape(worker.layers, spec.num_experts, spec.top_k)
    runner = TeamRunner(team, config, prescheduler, shape)
    tokenizer = Tokenizer.from_path(config.model)
    eos = frozenset(eos_token_ids(config.model)) | frozenset(tokenizer.eos_token_ids)
    return ParallelEngine(runner, tokenizer, spec, eos, plan)


def complete(engine: ParallelEngine, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[list[int]]:
    """Each prompt's new tokens, all prompts served together."""
    for i, prompt in enumerate(prompts):
        engine.add_request(Request(str(i), tuple(prompt), params))
    tokens: list[list[int]] = [[] for _ in prompts]
    while engine.has_work():
        for output in engine.step():
            assert output.error is None, output.error
            tokens[int(output.request_id)] += output.token_ids
    return tokens
