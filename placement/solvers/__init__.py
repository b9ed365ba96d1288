"""Solvers by name: each file here exports `solve`, except `solver.py`, which says what that is.

A package from outside offers one as an entry point of the group "moe_serve.solvers".
"""

from __future__ import annotations

from moe_serve_base.extensions import Extensions

SOLVERS = Extensions(
    "solver",
    __name__,
    __path__,
    symbol="solve",
    group="moe_serve.solvers",
    attributes=("__call__",),
    helpers=("solver",),
)


def solver_names() -> list[str]:
    """Every solver, in alphabetical order. Imports no numpy: help must answer at once."""
    return SOLVERS.names()
