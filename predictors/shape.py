"""MoELayer, Key: how layers and experts are counted wherever routes, caches and predictors meet. Knows no model."""

from __future__ import annotations

from typing import NewType

MoELayer = NewType("MoELayer", int)
"""0, 1, 2 ... over the layers with experts. The checkpoint's index of the same layer is its decoder layer, which only
an ExpertStore knows."""
Key = tuple[MoELayer, int]
"""An expert: its layer, and its number there."""
