from __future__ import annotations

from collections.abc import Iterator

import pytest

from moe_serve.demo import MODEL
from moe_serve.grammars.grammars import Grammars
from moe_serve.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_path(str(MODEL))


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Iterator[Grammars]:
    grammars = Grammars.of(tokenizer, tokenizer.vocab_size, frozenset(tokenizer.eos_token_ids))
    yield grammars
    grammars.close()
