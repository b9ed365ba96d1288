"""Expert parallelism on the demo model: bytes between ranks and tokens per second, by mode and placement.

    deepspeed --num_gpus 2 benchmarks/bench_parallel.py --prompts TEXT_FILE        (or torchrun --nproc-per-node 2 ...)

Rank 0 records the routes of some prompts on one rank, plans from them, and serves others on all ranks under every
variant, interleaved. Only steps that do nothing but decode count. "forecast" is what the planning prompts' routes
predict for a placement, "followed" what the served prompts' own routes do: the first tests the planner's knowledge
of the traffic, the second the arithmetic. Trips are waits for other ranks within a step, each a link's delay long.
stdout: one line of JSON, from rank 0.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
import torch.distributed as dist

from moe_serve import LLM, SamplingParams
from moe_serve.cli.flags import default_model
from moe_serve.config import EngineConfig, ParallelConfig
from moe_serve.expert_routes.route_recorder import RouteRecorder
from moe_serve.parallel.expert_plans import read_hosts
from moe_serve.parallel.front.token_uses import count_uses
from moe_serve.parallel.ranks import rank_model
from moe_serve.parallel.ranks.worker import Worker
from moe_serve.parallel.wire.environment import read_place
from moe_serve.parallel.wire.messages import Order, Step
from moe_serve.parallel.wire.sockets import Wire, connect_all
from placement.plan import save_plan
from placement.problem import PlacementProblem
from placement.solve import find_plan
from placement.topology import Topology
from predictors.trace import RoutingTrace, offsets_of
from tests.support.group_team import GroupTeam, Kind, complete, engine_over, follow
from tests.support.traffic_forecast import RowBytes, forecast


@dataclass(frozen=True)
class Variant:
    """A way of serving."""

    mode: str
    plan: str
    predicted: bool = False
    """Whether sequences live where a predictor expects their experts."""
    groups: int = 1


VARIANTS = (
    Variant("conventional", "contiguous"),
    Variant("conventional", "planned"),
    Variant("coherent", "contiguous"),
    Variant("coherent", "planned"),
    Variant("coherent", "planned", predicted=True),
    Variant("conventional", "replicas"),
    Variant("coherent", "replicas"),
    Variant("coherent", "grouped", groups=2),
)
"""The last needs 4 ranks at least."""
REPLICAS = 2
"""Further experts per rank and layer in "replicas"."""
PATIENCE_S = 3600.0
"""The other ranks wait while the first records and plans."""
KINDS = ("dispatch", "combine", "control")


class CountingTeam(GroupTeam):
    """Notes bytes and seconds of the steps that only decode."""

    def __init__(self, worker: Worker, parallel: ParallelConfig, wire: Wire) -> None:
        super().__init__(worker, parallel, wire)
        self.bytes = dict.fromkeys((*KINDS, "unmerged"), 0)
        self.tokens = 0
        self.step_s: list[float] = []
        self.cpu_s = 0.0
        """CPU time of this process, the ranks' first, in those steps."""
        self.trips = 0
        """Of all ranks together."""
        self.homes: dict[str, int] = {}

    def ask_all(self, order: Order, kind: type[Kind]) -> list[Kind]:
        before, start, cpu_start = self._sent(), time.perf_counter(), time.process_time()
        answers = super().ask_all(order, kind)
        assert isinstance(order, Step)
        self.homes.update({entry.request_id: entry.home for entry in order.new})
        if all(item.count == 1 for item in order.items):
            self.step_s.append(time.perf_counter() - start)
            self.cpu_s += time.process_time() - cpu_start
            self.tokens += len(order.items)
            after = self._sent()
            self.trips += after["trips"] - before["trips"]
            for name in self.bytes:
                self.bytes[name] += after[name] - before[name]
        return answers

    def _sent(self) -> dict[str, int]:
        totals = [counted.traffic for counted in self.counted.values()]
        sent = {kind: sum(t[f"{kind}_bytes"] for t in totals) for kind in self.bytes}
        return {**sent, "trips": sum(t["trips"] for t in totals)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, help="text to cut prompts from")
    parser.add_argument("--model", default=default_model())
    parser.add_argument("--count", type=int, default=16, help="prompts served")
    parser.add_argument("--plan-count", type=int, default=64, help="prompts to plan from")
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--effort", type=int, default=4, help="of the planner")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of variants")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher; the environment has it too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    place = read_place()
    rank_model.join_group(place, "cpu", PATIENCE_S)
    with torch.inference_mode():
        jobs = [prepare(args, place.world_size) if place.is_first else None]
        dist.broadcast_object_list(jobs)
        (job,) = jobs
        assert job is not None
        run(args, place, job)
    dist.barrier()
    dist.destroy_process_group()


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"model": args.model, "max_num_seqs": args.count, "max_model_len": 512, "num_kv_pages": 1024}


def prepare(args: argparse.Namespace, num_ranks: int) -> dict[str, Any]:
    """On rank 0: routes of all prompts, and the plans made from those to plan from, which come first."""
    llm = LLM(**settings(args), num_threads=1)
    text = args.prompts.read_text()
    draw = random.Random(0)
    starts = [draw.randrange(len(text) - 2000) for _ in range(args.plan_count + args.count)]
    prompts = [llm.tokenizer.encode(text[s : s + 2000])[5 : 5 + args.length] for s in starts]
    routes = record(llm, prompts, args.new_tokens)
    folder = Path(tempfile.mkdtemp())
    planning = np.concatenate([ids for _, ids in routes[: args.plan_count]])
    plans: dict[str, str | None] = {"contiguous": None}
    for name, devices, spare in (
        ("planned", num_ranks, 0),
        ("replicas", num_ranks, REPLICAS),
        ("grouped", num_ranks // 2, 0),
    ):
        problem = PlacementProblem.from_routes(
            planning, llm.engine.spec.num_experts, Topology.even(devices), "all", spare_slots=spare
        )
        save_plan(find_plan(problem, "auto", effort=args.effort, time_limit_s=20.0), folder / f"{name}.json")
        plans[name] = str(folder / f"{name}.json")
    print("planned", file=sys.stderr, flush=True)
    first = [len(tokens) for tokens, _ in routes[: args.plan_count]]
    trace = RoutingTrace(
        planning,
        offsets_of(first),
        np.array(llm.engine.routing_shape().layer_ids),
        llm.engine.spec.num_experts,
        token_ids=np.concatenate([tokens for tokens, _ in routes[: args.plan_count]]),
    )
    uses = count_uses(trace)
    llm.close()
    return {"prompts": prompts, "routes": routes, "plans": plans, "uses": uses}


def record(llm: LLM, prompts: list[list[int]], new_tokens: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each prompt the token ids [N] that were computed and the experts [N, L, K] they went to."""
    size = sum(map(len, prompts)) + len(prompts) * new_tokens
    recorder = RouteRecorder(llm.engine.routing_shape(), size, token_ids=True)
    llm.engine.observe_routes(recorder)
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True))
    llm.engine.observe_routes(recorder, wanted=False)
    trace = recorder.trace({})
    assert trace.token_ids is not None
    routes = [(trace.token_ids[a:b], trace.ids[a:b]) for a, b in pairwise(trace.seq_offsets.tolist())]
    assert [tokens[: len(prompt)].tolist() for (tokens, _), prompt in zip(routes, prompts, strict=True)] == prompts
    return routes


def run(args: argparse.Namespace, place: Any, job: dict[str, Any]) -> None:
    """Every variant in every round; rank 0 prints."""
    chosen = [
        v for i, v in enumerate(VARIANTS) if (not args.only or i in args.only) and place.world_size >= 2 * v.groups
    ]
    workers, wire = [], connect_all(place, PATIENCE_S)
    for v in chosen:
        settings_of = {"ep_mode": v.mode, "expert_plan": job["plans"][v.plan]}
        parallel = ParallelConfig(devices=place.world_size, ep_groups=v.groups, **settings_of)
        config = EngineConfig.of(**settings(args), num_threads=1, device="cpu")
        workers.append((parallel, Worker(rank_model.load(place, config, parallel))))
    teams = [CountingTeam(worker, parallel, wire) for parallel, worker in workers]
    tokens: list[Any] = []
    for _ in range(args.rounds):
        for (_, worker), team, variant in zip(workers, teams, chosen, strict=True):
            if place.is_first:
                tokens.append(serve(args, team, worker, job, variant))
            else:
                follow(worker, wire)
    if place.is_first:
        rows = [report(args, team, worker, job, v) for (_, worker), team, v in zip(workers, teams, chosen, strict=True)]
        alone = [known[args.length :].tolist() for known, _ in job["routes"][args.plan_count :]]
        same = all([sequence[:-1] for sequence in served] == alone for served in tokens)
        facts = {"ranks": place.world_size, "tokens_as_on_one_rank": same}
        print(json.dumps({**facts, "rows": rows}), flush=True)


def serve(args: argparse.Namespace, team: CountingTeam, worker: Worker, job: dict[str, Any], variant: Variant) -> Any:
    engine = engine_over(team, worker, job["uses"] if variant.predicted else None)
    params = SamplingParams(temperature=0, max_tokens=args.new_tokens, ignore_eos=True)
    tokens = complete(engine, job["prompts"][args.plan_count :], params)
    team.stop()
    print(variant, f"{sum(team.step_s):.1f} s", file=sys.stderr, flush=True)
    return tokens


def report(args: argparse.Namespace, team: CountingTeam, worker: Worker, job: dict[str, Any], variant: Variant) -> Any:
    """A row of the result; forecasts where no predictor chose the homes."""
    sent = {kind: count / team.tokens for kind, count in team.bytes.items()}
    row = {**asdict(variant), "bytes_per_token": sum(sent[kind] for kind in KINDS), "sent": sent}
    steps = len(team.step_s)
    row["trips_per_step"] = team.trips / team.num_ranks / steps
    row["tokens_per_s"] = team.tokens / sum(team.step_s)
    row["median_ms_per_step"] = 1e3 * statistics.median(team.step_s)
    row["cpu_ms_per_step"] = 1e3 * team.cpu_s / steps
    if variant.predicted:
        return row
    spec, size = engine_over(team, worker).spec, team.num_ranks // variant.groups
    hosts = read_hosts(job["plans"][variant.plan], worker.layers, spec.num_experts, size)
    sizes = RowBytes.of(variant.mode, spec.hidden_size, spec.top_k, 4)
    served = job["routes"][args.plan_count :]
    for name, routes in (("forecast", job["routes"][: args.plan_count]), ("followed", served)):
        decoded = [ids[args.length :] for _, ids in routes]
        at = [team.homes[str(i)] if routes is served else i for i in range(len(decoded))]
        homes = np.concatenate([np.full(len(ids), home % size) for ids, home in zip(decoded, at, strict=True)])
        row[name] = asdict(forecast(variant.mode, np.concatenate(decoded), hosts, homes, sizes))
    return row


if __name__ == "__main__":
    main()
