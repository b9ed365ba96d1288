"""LateGrammars: a rank's grammars, with a tokenizer of its own that is read when the first grammar comes.

The front has checked every grammar; ranks compile it again, in processes of their own, and only the first mask
waits for that. Knows settings and grammars; knows no steps.
"""

from __future__ import annotations

from functools import cached_property

from moe_serve.config import EngineConfig
from moe_serve.grammars.grammars import GrammarLimits, Grammars
from moe_serve.grammars.matcher import Matcher
from moe_serve.hf.config_file import read_config
from moe_serve.scheduling.sequence import GrammarSpec
from moe_serve.spec import ModelSpec
from moe_serve.text.generation_defaults import eos_token_ids
from moe_serve.text.tokenizer import Tokenizer


class LateGrammars:
    """As Grammars, for one rank."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config

    def start(self, spec: GrammarSpec) -> Matcher:
        """The grammar before its first token."""
        return self._grammars.start(spec)

    @cached_property
    def _grammars(self) -> Grammars:
        config = self._config
        tokenizer = Tokenizer.from_path(config.tokenizer or config.model, config.chat_template)
        vocab_size = ModelSpec.from_hf(read_config(config.model)).vocab_size
        eos = frozenset(eos_token_ids(config.model)) | frozenset(tokenizer.eos_token_ids)
        limits = GrammarLimits(config.queue.grammar_timeout_s, config.queue.grammar_memory_mib)
        return Grammars(tokenizer, vocab_size, eos, limits)
