"""Which experts are on the device, and getting them there.

May use moe_serve_kernels and predictors; knows nothing of requests, HTTP or whole models.
"""

from __future__ import annotations

from moe_serve_base.public_names import loader

__all__ = [
    "Capacity",
    "Events",
    "ExpertReport",
    "Policy",
    "ReplayResult",
    "ShadowCache",
    "compare",
    "events_of",
    "find_policy",
    "global_pool",
    "per_layer",
    "policy_names",
    "replay_belady",
    "replay_events",
]
HOMES = {
    "Capacity": "simulation.capacity:Capacity",
    "Events": "simulation.events:Events",
    "ExpertReport": "report:ExpertReport",
    "Policy": "policies.policy:Policy",
    "ReplayResult": "simulation.replay:ReplayResult",
    "ShadowCache": "simulation.shadow:ShadowCache",
    "compare": "simulation.replay:compare",
    "events_of": "simulation.events:events_of",
    "find_policy": "policies:find_policy",
    "global_pool": "simulation.capacity:global_pool",
    "per_layer": "simulation.capacity:per_layer",
    "policy_names": "policies:policy_names",
    "replay_belady": "simulation.replay:replay_belady",
    "replay_events": "simulation.replay:replay_events",
}
"""Public name -> the module that defines it, and its name there."""


__getattr__ = loader(__name__, HOMES)
