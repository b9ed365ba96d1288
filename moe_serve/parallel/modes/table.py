"""MODES: how ranks share the work, by the name that --ep-mode gives. Knows the modes; knows no sockets."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from moe_serve.engine.model_runner import ModelRunner
from moe_serve.parallel.modes.conventional import ConventionalRunner
from moe_serve.parallel.modes.expert_share import ExpertShare
from moe_serve.parallel.modes.recompute import RecomputingRunner
from moe_serve.parallel.modes.runner import RankRunner

MODES: Mapping[str, Callable[[ModelRunner, ExpertShare], RankRunner]] = {
    "conventional": ConventionalRunner,
    "coherent": RecomputingRunner,
}
