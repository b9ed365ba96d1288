"""How OpenMP's idle threads wait, chosen before torch starts them.

libgomp's default lets a thread spin for milliseconds after its work, which on a machine with few cores
takes them from the threads that read experts; sleeping at once costs a wake-up of 20 us or more per
parallel region. A short spin is better than both (docs/log/cpu-kernels.md). Imports no torch.
"""

from __future__ import annotations

from collections.abc import MutableMapping

SPIN_COUNT = "20000"
"""Turns of libgomp's waiting loop: some tens of microseconds, the gap between two layers' products."""


def spin_briefly(environment: MutableMapping[str, str]) -> None:
    """Set libgomp's spin count, unless the user has chosen a waiting policy. Without effect once torch is imported."""
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
