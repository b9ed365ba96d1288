"""What each rank of test_parallel.py runs under a launcher: every case of a job, all ranks in one process group.

    deepspeed --num_gpus 2 rank_program.py JOB.json

Rank 0 writes each case's tokens and traffic to the job's output file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moe_serve.config import EngineConfig, ParallelConfig
from moe_serve.hf.config_file import read_config
from moe_serve.parallel.front.token_uses import TokenUses
from moe_serve.parallel.ranks import rank_model
from moe_serve.parallel.ranks.worker import Worker
from moe_serve.parallel.wire.environment import RankAddress, read_place
from moe_serve.parallel.wire.sockets import GroupWire, Wire, connect_all
from tests.families import rank_cases
from tests.support.group_team import GroupTeam, engine_over, follow


def lead(worker: Worker, parallel: ParallelConfig, wire: Wire, case: dict[str, Any]) -> dict[str, Any]:
    """Complete the case's prompts together."""
    team = GroupTeam(worker, parallel, wire)
    engine = engine_over(team, worker, random_uses(worker, case))
    served = rank_cases.serve(engine, case)
    report = rank_cases.report(engine)
    team.stop()
    return {**served, **report, "traffic": [counted.traffic for counted in team.counted.values()]}


def random_uses(worker: Worker, case: dict[str, Any]) -> TokenUses | None:
    """A predictor's table of random counts: it predicts nothing, and tokens must not care."""
    if case.get("predictor_seed") is None:
        return None
    rng = np.random.default_rng(case["predictor_seed"])
    vocab = read_config(worker.config.model).vocab_size
    counts = rng.integers(0, 50, (vocab, len(worker.layers), case["num_experts"]))
    return TokenUses(np.arange(vocab), counts, np.array(worker.layers))


def check_group_wire(place: RankAddress) -> None:
    """What GPUs trade over, here over gloo: messages of any length, also none."""
    others = [rank for rank in range(place.world_size) if rank != place.rank]
    outgoing = {rank: torch.full((5 * place.rank,), rank, dtype=torch.uint8) for rank in others}
    for rank, raw in GroupWire(torch.device("cpu")).trade(outgoing, others).items():
        assert raw.tolist() == [place.rank] * (5 * rank)


def main() -> None:
    torch.set_num_threads(1)
    job = json.loads(Path(next(arg for arg in sys.argv[1:] if arg.endswith(".json"))).read_text())
    place = read_place()
    rank_model.join_group(place, "cpu", 300)
    check_group_wire(place)
    wire = connect_all(place, 300)
    results: list[dict[str, Any]] = []
    for case in job["cases"]:
        parallel = ParallelConfig(devices=place.world_size, **case["parallel"])
        with torch.inference_mode():
            config = EngineConfig.of(model=case["folder"], **case["engine"])
            worker = Worker(rank_model.load(place, config, parallel))
            if place.is_first:
                print(len(results), case["parallel"], file=sys.stderr, flush=True)
                results.append(lead(worker, parallel, wire, case))
            else:
                follow(worker, wire)
    if place.is_first:
        Path(job["output"]).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
