"""GroupTeam: a team inside one process group, without a front: for jobs that a launcher starts as a whole.

Rank 0 leads and has the engine; the others follow its steps. Measurements and tests load many models one after
the other this way. A lost rank ends the job.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from moe_serve.generation_defaults import eos_token_ids
from moe_serve.hf.checkpoint import read_config
from moe_serve.parallel.channel import Message
from moe_serve.parallel.config import ParallelConfig
from moe_serve.parallel.engine import ParallelEngine
from moe_serve.parallel.plans import read_plan
from moe_serve.parallel.prescheduling import Counts, Prescheduler, TokenAffinity
from moe_serve.parallel.team_runner import TeamRunner
from moe_serve.parallel.worker import Worker
from moe_serve.route_recorder import RoutingShape
from moe_serve.sequence import Request, SamplingParams
from moe_serve.spec import ModelSpec
from moe_serve.tokenizer import Tokenizer
from placement.cost import hosts_of


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
        """As JSON, because that is what ranks behind sockets would see."""
        dist.broadcast_object_list([json.dumps(message)])
        answers: list[Any] = [None] * self.num_ranks
        dist.gather_object(json.dumps(self._worker.answer(message)), answers)
        parsed = [json.loads(answer) for answer in answers]
        if "traffic" in parsed[0]:
            self.counted = dict(enumerate(parsed))
        return parsed

    def reports(self) -> tuple[int, dict[int, Message]]:
        """As Team.reports; here the ranks are asked, so not during a step."""
        return self.generation, dict(enumerate(self.ask_all({"op": "report"})))

    def stop(self) -> None:
        """The followers' loops end."""
        dist.broadcast_object_list([json.dumps(None)])


def follow(worker: Worker) -> None:
    """The steps of a rank that is not the first, until rank 0 stops."""
    while True:
        box: list[Any] = [None]
        dist.broadcast_object_list(box)
        message = json.loads(box[0])
        if message is None:
            return
        dist.gather_object(json.dumps(worker.answer(message)))


def engine_over(team: Any, worker: Worker, uses: Counts | None = None) -> ParallelEngine:
    """Rank 0's engine. `uses` [V, L, E]: the predictor's table (prescheduling)."""
    config, parallel = worker.config, team.parallel
    spec = ModelSpec.from_hf(read_config(config.model))
    plan = read_plan(parallel.expert_plan, worker.layers, spec.num_experts, parallel.devices)
    follow = None if uses is None else lambda hosts: TokenAffinity(uses, hosts)
    affinity = None if follow is None else follow(hosts_of(plan.layout, parallel.devices))
    shape = RoutingShape(worker.layers, spec.num_experts, spec.top_k)
    runner = TeamRunner(team, config, Prescheduler(parallel.devices, affinity, follow), shape)
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
