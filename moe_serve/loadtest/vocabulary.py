"""Spells planned prompts in the server's own tokens, without having its tokenizer.

/v1/completions takes token ids, so prompts have exactly the planned length; chat takes text only,
so words are counted by the average tokens per word that the server's /tokenize reports. Where there
is no /tokenize, low token ids stand in: every vocabulary has them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_serve.loadtest.datasets import Pieces, PlannedRequest

if TYPE_CHECKING:
    import httpx

_COMMON = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government number "
    "night point home water room mother area money story fact month lot right study book eye job word "
    "business issue side kind head house service friend father power hour game line end member law "
    "car city community name president team minute idea body information back parent face others "
    "level office door health person art war history party result change morning reason research girl "
    "guy moment air teacher force education river mountain garden window letter summer winter stone "
    "bridge ship horse bread silver yellow quiet early strong narrow simple distant heavy bright open "
    "follow carry answer listen remember travel build measure forget gather return cross under "
    "between against without during because although perhaps seven hundred"
)
WORDS = tuple(_COMMON.split())
STAND_IN_IDS = range(32, 256)
CHARS_PER_TOKEN = 4
"""English text in common vocabularies; used only where nothing can count."""


@dataclass(frozen=True, slots=True)
class ReadyRequest:
    """What goes on the wire."""

    prompt: str | list[int]
    input_tokens: int
    """As planned; the server's own count, where it reports one, replaces it."""
    output_tokens: int
    arrival_s: float | None


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What is known of the server's tokens."""

    token_ids: tuple[int, ...]
    tokens_per_word: float

    def spell_ids(self, pieces: Pieces) -> list[int]:
        """Equal pieces give equal ids, and a shorter piece of the same seed is a prefix of a longer one."""
        return [token for seed, length in pieces for token in random.Random(seed).choices(self.token_ids, k=length)]

    def spell_text(self, pieces: Pieces) -> str:
        words = []
        for seed, length in pieces:
            words += random.Random(seed).choices(WORDS, k=max(1, round(length / self.tokens_per_word)))
        return " ".join(words)


class TokenCounter:
    """Asks the server's /tokenize; falls back to a rule of thumb for good once that fails."""

    def __init__(self, client: httpx.AsyncClient, model: str) -> None:
        self._client = client
        self._model = model
        self._works = True

    async def token_ids(self, text: str) -> list[int] | None:
        import httpx

        if not self._works:
            return None
        try:
            response = await self._client.post("/tokenize", json={"model": self._model, "prompt": text})
            if response.status_code == 200:
                return [int(token) for token in response.json()["tokens"]]
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            pass
        self._works = False
        return None

    async def count(self, text: str) -> int:
        ids = await self.token_ids(text)
        return max(1, len(text) // CHARS_PER_TOKEN) if ids is None else len(ids)

    async def vocabulary(self) -> Vocabulary:
        ids = await self.token_ids(" ".join(WORDS))
        if not ids:
            return Vocabulary(tuple(STAND_IN_IDS), 1.0)
        # The first token may be a begin-of-sequence mark, which belongs in no middle of a prompt.
        return Vocabulary(tuple(sorted(set(ids[1:]))), len(ids) / len(WORDS))


async def spell(plan: list[PlannedRequest], counter: TokenCounter, as_text: bool) -> list[ReadyRequest]:
    vocabulary = await counter.vocabulary()
    return [await _spell_one(request, vocabulary, counter, as_text) for request in plan]


async def _spell_one(
    request: PlannedRequest, vocabulary: Vocabulary, counter: TokenCounter, as_text: bool
) -> ReadyRequest:
    output = request.output_tokens or await counter.count(request.reference)
    if isinstance(request.prompt, str):
        return ReadyRequest(request.prompt, await counter.count(request.prompt), output, request.arrival_s)
    length = sum(length for _, length in request.prompt)
    prompt = vocabulary.spell_text(request.prompt) if as_text else vocabulary.spell_ids(request.prompt)
    return ReadyRequest(prompt, length, output, request.arrival_s)
