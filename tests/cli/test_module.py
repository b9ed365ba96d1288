"""`python -m moe_serve`, as launchers start it."""

from __future__ import annotations

import subprocess
import sys


def test_deepspeeds_own_argument_is_not_ours() -> None:
    """Its launcher puts --local_rank=N before the arguments of every module."""
    command = [sys.executable, "-m", "moe_serve", "--local_rank=0", "serve", "--help"]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--expert-plan-interval" in told.stdout
