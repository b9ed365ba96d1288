"""Where torch's functions are torch's own, although a mode is entered that stands in front of them (fixed_order.py).

Passing through a mode takes about as long as a small operation. Code whose order of sums is fixed anyway need not.
"""

from __future__ import annotations

from typing import Any

import torch


def plain_torch() -> Any:
    """A context for code that calls our kernels, or gives one sequence's tokens to torch."""
    return torch._C.DisableTorchFunction()
