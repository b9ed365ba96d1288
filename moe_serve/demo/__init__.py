"""The demo model that is part of the package; examples/train_demo made it."""

from __future__ import annotations

from pathlib import Path

MODEL = Path(__file__).resolve().parent / "model"
"""A Hugging Face folder."""
