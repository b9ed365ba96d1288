"""Running a layer's experts: the interface that all ways of keeping them share, and what runs without a cache.

The names here are what other rooms of expert_cache use.
"""

from __future__ import annotations

from expert_cache.running.compute import ExpertCompute, PreparedWeights, Segment
from expert_cache.running.experts import PaddingRows, Plan, ResizeError, Work, nothing
from expert_cache.running.in_place import InPlaceExperts, layers_of
from expert_cache.running.local_experts import LocalExperts, RegroupedExperts
from expert_cache.running.mapped import MappedExperts
from expert_cache.running.regroup import Regrouped

__all__ = [
    "ExpertCompute",
    "InPlaceExperts",
    "LocalExperts",
    "MappedExperts",
    "PaddingRows",
    "Plan",
    "PreparedWeights",
    "Regrouped",
    "RegroupedExperts",
    "ResizeError",
    "Segment",
    "Work",
    "layers_of",
    "nothing",
]
