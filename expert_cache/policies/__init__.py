"""Cache policies by file name: each file here exports `POLICY`, except `policy.py`, which says what that is.

Listing names imports nothing, so that `--help` stays quick.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from expert_cache.policies.policy import PolicyMaker

NO_POLICY = ("policy",)


def policy_names() -> list[str]:
    """Every policy, in alphabetical order."""
    return sorted(info.name for info in pkgutil.iter_modules(__path__) if info.name not in NO_POLICY)


def find_policy(name: str) -> PolicyMaker:
    """The policy in `<name>.py`. Raises ValueError naming the ones there are."""
    if name not in policy_names():
        raise ValueError(f"policy {name!r} is not one of {', '.join(policy_names())}")
    maker: PolicyMaker = importlib.import_module(f"{__name__}.{name}").POLICY
    return maker
