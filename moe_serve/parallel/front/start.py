"""From settings to an engine over ranks, which a launcher or we ourselves start. Here the parts are put together."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

from moe_serve.config import EngineConfig, ParallelConfig
from moe_serve.errors import ConfigError
from moe_serve.hf.config_file import read_config
from moe_serve.parallel.expert_plans import read_plan
from moe_serve.parallel.front.engine import ParallelEngine
from moe_serve.parallel.front.gathering import Gathering
from moe_serve.parallel.front.prescheduling import Prescheduler
from moe_serve.parallel.front.spawner import Spawner
from moe_serve.parallel.front.team import Team
from moe_serve.parallel.front.team_runner import TeamRunner
from moe_serve.parallel.front.token_uses import load_uses
from moe_serve.parallel.wire import environment
from moe_serve.spec import ModelSpec
from moe_serve.text.generation_defaults import eos_token_ids
from moe_serve.text.tokenizer import Tokenizer
from placement.cost import hosts_of
from predictors.predictor import RouterShape


def engine_over_ranks(config: EngineConfig, parallel: ParallelConfig) -> ParallelEngine | None:
    """Starts the ranks, or connects to those of a launcher; None for one device. ConfigError and its subclasses."""
    if parallel.devices == 1:
        return None
    spec = ModelSpec.from_hf(read_config(config.model))  # a wrong folder is found before any process starts
    tokenizer = Tokenizer.from_config(config)
    uses = None if parallel.ep_predictor is None else load_uses(parallel.ep_predictor)
    team = _team(config, parallel)
    resolved = team.start()
    try:
        plan = read_plan(parallel.expert_plan, team.layers, spec.num_experts, parallel.ranks_per_group)
        if uses is not None:
            uses.check_fit(str(parallel.ep_predictor), team.layers, spec.num_experts)
    except BaseException:
        team.stop()
        raise
    eos = frozenset(eos_token_ids(config.model)) | frozenset(tokenizer.eos_token_ids)
    prescheduler = Prescheduler(hosts_of(plan.layout, parallel.ranks_per_group), uses)
    shape = RouterShape(team.layers, spec.num_experts, spec.top_k)
    return ParallelEngine(TeamRunner(team, resolved, prescheduler, shape), tokenizer, spec, eos, plan)


def _team(config: EngineConfig, parallel: ParallelConfig) -> Team:
    if environment.is_launched():
        return _launched_team(config, parallel)
    threads = config.num_threads or max(1, len(os.sched_getaffinity(0)) // parallel.devices)
    config = dataclasses.replace(config, num_threads=threads)
    spawner = Spawner(parallel.devices, threads)
    return Team(parallel, Gathering(config, parallel, ("127.0.0.1", parallel.rank_port), spawner), spawner)


def _launched_team(config: EngineConfig, parallel: ParallelConfig) -> Team:
    """The front beside rank 0. The launcher started this process as rank 0, so the rank itself is our child."""
    place = environment.read_place()
    if parallel.devices != place.world_size:
        raise ConfigError(f"--devices {parallel.devices}: the launcher started {place.world_size} ranks")
    if config.num_threads is None:
        local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or place.world_size)
        config = dataclasses.replace(config, num_threads=max(1, len(os.sched_getaffinity(0)) // local))
    secret = os.environ.get(environment.SECRET, "")
    host, port = environment.front_address(place)
    gathering = Gathering(config, parallel, (host, parallel.rank_port or port), None, secret)
    if not secret and not gathering.host.startswith("127."):
        gathering.close()
        raise ConfigError(
            f"ranks on other machines can be reached by strangers: set {environment.SECRET} to the same secret word for"
            " the front and for every rank"
        )
    subprocess.Popen([sys.executable, "-m", "moe_serve.parallel.ranks.rank"])
    return Team(parallel, gathering, None)
