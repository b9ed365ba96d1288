"""Guessing which experts the next layers and tokens will use, and scoring the guesses.

numpy only, torch in learned methods; knows neither caches nor models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_serve_base.public_names import loader

if TYPE_CHECKING:
    from predictors.evaluation import Scores, evaluate, split_sequences
    from predictors.files import load as load_predictor
    from predictors.files import save as save_predictor
    from predictors.methods import find_method, method_names
    from predictors.predictor import Predictor, RouterShape, Training
    from predictors.trace import RoutingTrace, TraceError
    from predictors.trace import load as load_trace

__all__ = [
    "Predictor",
    "RouterShape",
    "RoutingTrace",
    "Scores",
    "TraceError",
    "Training",
    "evaluate",
    "find_method",
    "load_predictor",
    "load_trace",
    "method_names",
    "save_predictor",
    "split_sequences",
]
HOMES = {
    "Predictor": "predictor:Predictor",
    "RouterShape": "predictor:RouterShape",
    "RoutingTrace": "trace:RoutingTrace",
    "Scores": "evaluation:Scores",
    "TraceError": "trace:TraceError",
    "Training": "predictor:Training",
    "evaluate": "evaluation:evaluate",
    "find_method": "methods:find_method",
    "load_predictor": "files:load",
    "load_trace": "trace:load",
    "method_names": "methods:method_names",
    "save_predictor": "files:save",
    "split_sequences": "evaluation:split_sequences",
}
"""Public name -> the module that defines it, and its name there."""


__getattr__ = loader(__name__, HOMES)
