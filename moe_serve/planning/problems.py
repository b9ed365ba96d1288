"""From recorded routes to placement problems: where `predictors.trace` and `placement` meet.

What the `plan` commands share and may not print. Errors of both packages become `ConfigError`.
"""

from __future__ import annotations

import hashlib
import json
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from moe_serve.config.units import MIB
from moe_serve.errors import ConfigError
from moe_serve.planning.recordings import Loads
from moe_serve_base.whole_files import whole_file, write_text
from placement.errors import PlacementError
from placement.formats import to_eplb, to_sglang
from placement.page import as_page
from placement.picture import save_picture
from placement.plan import PlacementPlan, check_plan, load_plan, save_plan
from placement.problem import PlacementProblem, count_load, count_transitions
from placement.topology import Topology
from predictors.trace import RoutingTrace, TraceError


@contextmanager
def user_errors() -> Iterator[None]:
    """Errors of the planner and of traces as the command line reports them."""
    try:
        yield
    except (PlacementError, TraceError) as error:
        raise ConfigError(str(error)) from error


def split_sequences(
    trace: RoutingTrace | Loads, held_out_frac: float, seed: int
) -> tuple[RoutingTrace | Loads, RoutingTrace | None]:
    """Whole sequences drawn at random: (for planning, held out)."""
    if held_out_frac == 0:
        return trace, None
    if isinstance(trace, Loads):
        raise ConfigError(f"--held-out needs sequences; {trace.source} holds loads only")
    count = round(trace.num_sequences * held_out_frac)
    if not 0 < count < trace.num_sequences:
        raise ConfigError(f"--held-out {held_out_frac} leaves nothing on one side of {trace.num_sequences} sequences")
    order = np.random.default_rng(seed).permutation(trace.num_sequences).tolist()
    return trace.select(sorted(order[count:])), trace.select(sorted(order[:count]))


def provenance(trace: RoutingTrace | Loads) -> dict[str, Any]:
    """What identifies a recording in a plan made from it."""
    if isinstance(trace, Loads):
        return {"source": trace.source, "sha256": hashlib.sha256(trace.load.tobytes()).hexdigest()}
    return {
        "source": trace.source,
        "tokens": trace.num_tokens,
        "sequences": trace.num_sequences,
        "sha256": hashlib.sha256(trace.ids.tobytes()).hexdigest(),
        "layer_ids": trace.layer_ids.tolist(),
    }


def topology_of(args: Namespace) -> Topology:
    """Devices as the flags describe them."""
    even = Topology.even(args.gpus, args.gpus_per_node)
    return Topology(
        node_of=even.node_of,
        node_hop_cost=1.0 if args.node_hop_cost is None else args.node_hop_cost,
        speed=np.array(args.speed or [], np.float64),
        memory_bytes=_memory_bytes(args),
    )


def _memory_bytes(args: Namespace) -> Any:
    sizes = np.array(args.memory_mib or [], np.float64) * MIB
    return (np.repeat(sizes, args.gpus) if sizes.size == 1 else sizes).astype(np.int64)


def problem_of(args: Namespace, trace: RoutingTrace | Loads) -> PlacementProblem:
    """The problem the flags pose on a recording; from loads alone there is no traffic in it."""
    load, transitions = _counts(trace, args.choices)
    shape = load.shape
    problem = PlacementProblem(
        load,
        transitions,
        topology_of(args),
        choices=args.choices,
        expert_bytes=max(1, round(args.expert_mib * MIB)),
        spare_slots=args.replicas,
        max_imbalance=args.max_imbalance,
        balance_price=args.balance_price,
        pinned=_pins(args.pin, shape),
        replica_routing=args.replica_routing,
    )
    if not args.current:
        return problem
    current = load_plan(Path(args.current))
    check_plan(current, problem)
    return problem.with_(current=current.layout.device_of, migration_price=args.migration_price)


def _counts(recording: RoutingTrace | Loads, choices: str) -> tuple[Any, Any]:
    """Load [L, E] and transitions [L-1, E, E]."""
    if isinstance(recording, Loads):
        layers, experts = recording.load.shape
        return recording.load, np.zeros((layers - 1, experts, experts))
    ids, experts = recording.ids, recording.num_experts
    return count_load(ids, experts), count_transitions(ids, experts, choices)


def _pins(pins: Sequence[str], shape: tuple[int, int]) -> Any:
    """[L, E] devices from "layer:expert:gpu" words; -1 elsewhere."""
    pinned = np.full(shape, -1)
    for pin in pins:
        words = pin.split(":")
        if len(words) != 3 or not all(word.isdigit() for word in words):
            raise ConfigError(f"--pin takes LAYER:EXPERT:GPU, numbered from 0, got {pin!r}")
        layer, expert, device = map(int, words)
        if layer >= shape[0] or expert >= shape[1]:
            raise ConfigError(f"--pin {pin}: the trace has {shape[0]} layers and {shape[1]} experts")
        pinned[layer, expert] = device
    return pinned


def problem_of_plan(plan: PlacementPlan, trace: RoutingTrace) -> PlacementProblem:
    """The problem a plan was made for, with another trace's loads and transitions."""
    settings = plan.objective
    topology = Topology(
        node_of=plan.node_of,
        gpu_hop_cost=float(settings.get("gpu_hop_cost", 1.0)),
        node_hop_cost=float(settings.get("node_hop_cost", 1.0)),
        speed=np.array(settings.get("speed", []), np.float64),
    )
    problem = PlacementProblem.from_routes(
        trace.ids,
        trace.num_experts,
        topology,
        str(settings.get("choices", "all")),
        slots=plan.slots,
        spare_slots=plan.spare_slots,
        expert_bytes=int(settings.get("expert_bytes", 1)),
        max_imbalance=settings.get("max_imbalance"),
        balance_price=float(settings.get("balance_price", 0.0)),
        replica_routing=str(settings.get("replica_routing", "nearest")),
    )
    check_plan(plan, problem)
    return problem


def write_results(
    args: Namespace,
    problem: PlacementProblem,
    plans: Sequence[PlacementPlan],
    best: PlacementPlan,
    unseen: PlacementProblem | None,
) -> None:
    """The files the flags ask for. Maps show the first plan against the best one."""
    if args.output:
        save_plan(best, args.output)
    if args.html:
        write_text(args.html, as_page(problem, plans, plans[0], best, unseen))
    if args.png:
        save_picture(problem, plans[0], best, args.png)
    if args.sglang:
        layer_ids = best.provenance.get("layer_ids", list(range(best.num_layers)))
        data = to_sglang(best, layer_ids, args.model_layers or max(layer_ids) + 1)
        write_text(args.sglang, json.dumps(data) + "\n")
    if args.eplb:
        with whole_file(args.eplb) as partial, partial.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **to_eplb(best))
