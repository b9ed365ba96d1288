"""A rank's grammars, with a tokenizer of its own that is read when the first grammar comes.

The front has checked every grammar; ranks compile it again, in processes of their own, beside the steps. Knows
settings and grammars; knows no steps.
"""

from __future__ import annotations

from moe_serve.config import EngineConfig
from moe_serve.grammars.grammars import GrammarLimits, Grammars, vocabulary_of
from moe_serve.grammars.processes import Vocabulary
from moe_serve.hf.config_file import read_config
from moe_serve.spec import ModelSpec
from moe_serve.text.generation_defaults import eos_token_ids
from moe_serve.text.tokenizer import Tokenizer


def late_grammars(config: EngineConfig) -> Grammars:
    """The grammars of one rank; making them reads no file."""
    limits = GrammarLimits(config.queue.grammar_timeout_s, config.queue.grammar_memory_mib)
    return Grammars(lambda: _vocabulary(config), limits=limits)


def _vocabulary(config: EngineConfig) -> Vocabulary:
    tokenizer = Tokenizer.from_config(config)
    eos = frozenset(eos_token_ids(config.model)) | frozenset(tokenizer.eos_token_ids)
    return vocabulary_of(tokenizer, ModelSpec.from_hf(read_config(config.model)).vocab_size, eos)
