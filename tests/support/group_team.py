"""GroupTeam: a team inside one process group, without a front: for jobs that a launcher starts as a whole.

Rank 0 leads and has the engine; the others follow its steps. Measurements and tests load many models one after
the other this way. A lost rank ends the job.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
import torch
from msgspec import Struct

from expert_cache.report import ExpertReport
from moe_serve.config import ParallelConfig
from moe_serve.hf.config_file import read_config
from moe_serve.parallel.expert_plans import read_plan
from moe_serve.parallel.front.engine import ParallelEngine
from moe_serve.parallel.front.prescheduling import Prescheduler
from moe_serve.parallel.front.team_runner import TeamRunner
from moe_serve.parallel.front.token_uses import TokenUses
from moe_serve.parallel.ranks.worker import Worker
from moe_serve.parallel.wire.messages import (
    Counted,
    Order,
    Outcome,
    Place,
    Resize,
    Step,
    StepDone,
    Stop,
    encode,
    restore,
)
from moe_serve.parallel.wire.sockets import Wire
from moe_serve.scheduling.sequence import Request, SamplingParams
from moe_serve.spec import ModelSpec
from moe_serve.text.generation_defaults import eos_token_ids
from moe_serve.text.tokenizer import Tokenizer
from placement.cost import hosts_of
from predictors.predictor import RouterShape


class TellReport(Struct, tag=True):
    """A follower answers with its experts' report."""


class Report(Struct, tag=True):
    """The answer."""

    report: ExpertReport


READ_LEADER = msgspec.msgpack.Decoder(Step | Place | Resize | TellReport | Stop, dec_hook=restore)
READ_FOLLOWER = msgspec.msgpack.Decoder(Outcome | Report, dec_hook=restore)
Kind = TypeVar("Kind", bound=Struct)


class GroupTeam:
    """The part of Team that an engine needs, over the process group."""

    generation = 1

    def __init__(self, worker: Worker, parallel: ParallelConfig, wire: Wire) -> None:
        """`wire`: between all ranks, for this team's messages alone."""
        self.parallel = parallel
        self.num_ranks = parallel.devices
        self.counted: dict[int, Counted] = {}
        self._worker = worker
        self._wire = wire

    def wait_until_ready(self) -> int:
        return self.generation

    def ask_all(self, order: Order, kind: type[Kind]) -> list[Kind]:
        """As bytes, because that is what ranks behind sockets would see, and as directly as they would get it."""
        answers = self._all(order)
        assert all(isinstance(answer, kind) for answer in answers)
        self.counted |= {rank: answer.counted for rank, answer in enumerate(answers) if isinstance(answer, StepDone)}
        return answers

    def _all(self, order: Struct) -> list[Any]:
        others = range(1, self.num_ranks)
        self._wire.trade(dict.fromkeys(others, packed(order)), ())
        own = READ_FOLLOWER.decode(encode(_answer(self._worker, READ_LEADER.decode(encode(order)))))
        heard = self._wire.trade({}, others)
        return [own, *(READ_FOLLOWER.decode(_bytes(heard[rank])) for rank in others)]

    def reports(self) -> tuple[int, dict[int, ExpertReport]]:
        """As Team.reports; here the ranks are asked, so not during a step."""
        return self.generation, {rank: answer.report for rank, answer in enumerate(self._all(TellReport()))}

    def stop(self) -> None:
        """The followers' loops end."""
        self._wire.trade(dict.fromkeys(range(1, self.num_ranks), packed(Stop())), ())


def follow(worker: Worker, wire: Wire) -> None:
    """The steps of a rank that is not the first, until rank 0 stops."""
    while True:
        message = READ_LEADER.decode(_bytes(wire.trade({}, [0])[0]))
        if isinstance(message, Stop):
            return
        wire.trade({0: packed(_answer(worker, message))}, ())


def _answer(worker: Worker, message: Order | TellReport) -> Struct:
    return Report(worker.report()) if isinstance(message, TellReport) else worker.answer(message)


def packed(message: Struct) -> torch.Tensor:
    """uint8 [n]."""
    return torch.frombuffer(bytearray(encode(message)), dtype=torch.uint8)


def _bytes(raw: torch.Tensor) -> bytes:
    return raw.cpu().numpy().tobytes()


def engine_over(team: Any, worker: Worker, uses: TokenUses | None = None) -> ParallelEngine:
    """Rank 0's engine. `uses`: what --ep-predictor would name."""
    config, parallel = worker.config, team.parallel
    spec = ModelSpec.from_hf(read_config(config.model))
    size = parallel.ranks_per_group
    plan = read_plan(parallel.expert_plan, worker.layers, spec.num_experts, size)
    prescheduler = Prescheduler(hosts_of(plan.layout, size), uses)
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
