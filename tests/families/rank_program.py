"""What each rank of test_parallel.py runs under a launcher: every case of a job, all ranks in one process group.

    deepspeed --num_gpus 2 rank_program.py JOB.json

Rank 0 has the engine; steps reach the other ranks through the process group instead of sockets, so that one
launch tests many models. Rank 0 writes each case's tokens and traffic to the job's output file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_serve import SamplingParams
from moe_serve.config import EngineConfig
from moe_serve.parallel import rank_model
from moe_serve.parallel.config import ParallelConfig
from moe_serve.parallel.engine import ParallelEngine
from moe_serve.parallel.environment import Place, read_place
from moe_serve.parallel.plans import read_hosts
from moe_serve.parallel.prescheduling import Prescheduler, TokenAffinity
from moe_serve.parallel.team_runner import TeamRunner
from moe_serve.parallel.worker import Worker
from moe_serve.sequence import Request
from moe_serve.spec import ModelSpec
from moe_serve.tokenizer import Tokenizer


class GroupTeam:
    """A Team whose messages travel through the process group."""

    generation = 1

    def __init__(self, worker: Worker, parallel: ParallelConfig) -> None:
        self.worker = worker
        self.parallel = parallel
        self.num_ranks = parallel.devices
        self.counted: dict[int, Any] = {}

    def wait_until_ready(self) -> int:
        return self.generation

    def ask_all(self, message: dict[str, Any]) -> list[Any]:
        dist.broadcast_object_list([json.dumps(message)])
        answers: list[Any] = [None] * self.num_ranks
        dist.gather_object(self.worker.step(message), answers)
        self.counted = dict(enumerate(answers))
        return json.loads(json.dumps(answers))

    def stop(self) -> None:
        dist.broadcast_object_list([json.dumps(None)])


def follow(worker: Worker) -> None:
    """The steps of a rank that is not the first, until rank 0 says None."""
    while True:
        box: list[Any] = [None]
        dist.broadcast_object_list(box)
        message = json.loads(box[0])
        if message is None:
            return
        dist.gather_object(worker.step(message))


def lead(worker: Worker, parallel: ParallelConfig, case: dict[str, Any]) -> dict[str, Any]:
    """Complete the case's prompts together; greedy unless the case says otherwise."""
    from moe_serve.hf.checkpoint import read_config

    spec = ModelSpec.from_hf(read_config(worker.config.model))
    team: Any = GroupTeam(worker, parallel)
    runner = TeamRunner(team, worker.config, Prescheduler(parallel.devices, affinity(worker, parallel, case, spec)))
    engine = ParallelEngine(runner, Tokenizer.from_path(worker.config.model), spec, frozenset())
    params = SamplingParams(**case["params"])
    for i, prompt in enumerate(case["prompts"]):
        engine.add_request(Request(f"{i}", tuple(prompt), params))
    tokens: list[list[int]] = [[] for _ in case["prompts"]]
    while engine.has_work():
        for output in engine.step():
            assert output.error is None, output.error
            tokens[int(output.request_id)] += output.token_ids
    engine.check_integrity()
    traffic = [answer["traffic"] for answer in team.counted.values()]
    team.stop()
    return {"tokens": tokens, "traffic": traffic}


def affinity(worker: Worker, parallel: ParallelConfig, case: dict[str, Any], spec: ModelSpec) -> TokenAffinity | None:
    """A table of random counts: it predicts nothing, and tokens must not care."""
    if case.get("predictor_seed") is None:
        return None
    generator = torch.Generator().manual_seed(case["predictor_seed"])
    shape = (spec.vocab_size, len(worker.layers), spec.num_experts)
    counts = torch.randint(0, 50, shape, generator=generator).numpy()
    return TokenAffinity(counts, read_hosts(parallel.expert_plan, worker.layers, spec.num_experts, parallel.devices))


def main() -> None:
    torch.set_num_threads(1)
    job = json.loads(Path(next(arg for arg in sys.argv[1:] if arg.endswith(".json"))).read_text())
    place: Place = read_place()
    rank_model.join_group(place, ParallelConfig(devices=place.world_size, rank_step_s=60), EngineConfig(device="cpu"))
    results = []
    for case in job["cases"]:
        parallel = ParallelConfig(devices=place.world_size, **case["parallel"])
        with torch.inference_mode():
            worker = Worker(place, EngineConfig(model=case["folder"], **case["engine"]), parallel)
            if place.is_first:
                print(len(results), case["parallel"], file=sys.stderr, flush=True)
                results.append(lead(worker, parallel, case))
            else:
                follow(worker)
    if place.is_first:
        Path(job["output"]).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
