"""Cache policies by name: each file here exports `POLICY`, except `policy.py`, which says what that is.

A package from outside offers one as an entry point of the group "moe_serve.policies".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_serve_base.extensions import Extensions

if TYPE_CHECKING:
    from expert_cache.policies.policy import PolicyMaker

POLICIES = Extensions(
    "policy",
    __name__,
    __path__,
    symbol="POLICY",
    group="moe_serve.policies",
    attributes=("needs", "record", "keep_values", "keep_values_all"),
    helpers=("policy",),
)


def policy_names() -> list[str]:
    """Every policy, in alphabetical order."""
    return POLICIES.names()


def find_policy(name: str) -> PolicyMaker:
    """The policy of that name. ExtensionError (a ValueError) names the ones there are, or what is wrong with it."""
    maker: PolicyMaker = POLICIES.find(name)
    return maker
