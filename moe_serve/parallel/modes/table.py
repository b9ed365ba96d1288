"""Which mode a rank runs, by --ep-mode and --ep-groups. Knows the modes; knows no sockets."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from moe_serve.config import ParallelConfig
from moe_serve.engine.model_runner import ModelRunner
from moe_serve.parallel.modes.conventional import ConventionalRunner
from moe_serve.parallel.modes.expert_share import ExpertShare
from moe_serve.parallel.modes.grouping import GroupRunner
from moe_serve.parallel.modes.recompute import RecomputingRunner
from moe_serve.parallel.modes.runner import RankRunner

MODES: Mapping[str, Callable[[ModelRunner, ExpertShare], RankRunner]] = {
    "conventional": ConventionalRunner,
    "coherent": RecomputingRunner,
}


def make_runner(rank: int, parallel: ParallelConfig, runner: ModelRunner, share: ExpertShare) -> RankRunner:
    """The mode, within this rank's group of ranks."""
    mode = MODES[parallel.ep_mode](runner, share)
    size = parallel.ranks_per_group
    return mode if parallel.ep_groups == 1 else GroupRunner(mode, parallel.group_of(rank) * size, size)
