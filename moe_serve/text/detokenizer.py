"""IncrementalDetokenizer: token ids become text as they come, with stop strings found on the way.

Text is released as soon as no later token can change it: a UTF-8 character waits until it is
complete, and the end of the text waits while it could be the beginning of a stop string. Knows
tokenizers, not torch and not sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream

from moe_serve.scheduling.field_types import strings
from moe_serve.scheduling.sequence import SamplingParams
from moe_serve.text.tokenizer import Tokenizer

BROKEN = "\N{REPLACEMENT CHARACTER}"
CONTEXT_TOKENS = 8
"""Of a prompt's end."""


class IncrementalDetokenizer:
    """The text of one sample. Concatenated deltas equal the text of all ids, cut at a stop string.

    Except where a byte-fallback vocabulary (Llama, Mixtral) breaks UTF-8: there one bad byte turns the
    characters before it into U+FFFD too, which have been shown by then.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt: Sequence[int] = ()) -> None:
        """`prompt`: the token ids before. Some decoders drop a text's first space, and the answer is not the text's
        beginning: its text is what the tokenizer makes of both together, less the prompt's."""
        self._tokenizer = tokenizer
        self._skip_special = params.skip_special_tokens
        self._stream = DecodeStream(ids=self._context(prompt), skip_special_tokens=self._skip_special)
        self._pending: list[int] = []
        """Ids since the stream last gave text: half a character, or special tokens."""
        self._held = ""
        self._num_chars = 0
        """Of the text so far, what is held included."""
        self.token_start = 0
        """Where in the sample's text that of the newest token begins, in characters. Of two tokens that share a
        character, both begin with it; one that is not shown begins where the next does."""
        self._stops = strings("stop", params.stop)
        self._include_stop = params.include_stop_str_in_output

    def _context(self, prompt: Sequence[int]) -> list[int]:
        """The last tokens of a prompt, as far as they decide how the next is written."""
        start = max(0, len(prompt) - CONTEXT_TOKENS)
        while start > 0 and self._tokenizer.is_byte(prompt[start]):  # not from within a character
            start -= 1
        context = list(prompt[start:])
        return [] if self._tokenizer.decode(context, self._skip_special).endswith(BROKEN) else context

    def push(self, token_ids: Sequence[int]) -> tuple[str, str | None]:
        """New text that is safe to show, and the stop string that ended it, if one did."""
        for token_id in token_ids:
            piece = self._step(token_id)
            self.token_start = self._num_chars
            if piece is None:
                self._pending.append(token_id)
                continue
            if self._pending:
                self.token_start += self._chars_before(token_id, piece)
                self._pending.clear()
            self._held += piece
            self._num_chars += len(piece)
        return self._release()

    def push_each(self, token_ids: Sequence[int]) -> tuple[str, str | None, tuple[int, ...]]:
        """As `push`, and where the text of each token begins; tokens behind a stop string are left out."""
        text, starts = "", []
        for token_id in token_ids:
            more, stop = self.push([token_id])
            text += more
            starts.append(self.token_start)
            if stop is not None:
                return text, stop, tuple(starts)
        return text, None, tuple(starts)

    def _chars_before(self, token_id: int, piece: str) -> int:
        """Characters of a piece that the pending tokens made: they broke off, and this token begins a new one."""
        own = self._tokenizer.token_text(token_id)
        return len(piece) - len(own) if own and BROKEN not in own and piece.endswith(own) else 0

    def _step(self, token_id: int) -> str | None:
        try:
            return self._stream.step(self._tokenizer.backend, token_id)
        except Exception:  # the stream gives up on broken UTF-8 that changes text it has given out already
            self._stream = DecodeStream(ids=[token_id], skip_special_tokens=self._skip_special)
            return self._tokenizer.decode([*self._pending, token_id], self._skip_special)

    def flush(self) -> str:
        """What is still held back, when no more tokens will come: an incomplete character as U+FFFD."""
        text = self._held
        if self._pending:
            text += self._tokenizer.decode(self._pending, skip_special_tokens=self._skip_special)
        self._held = ""
        self._pending.clear()
        return text

    def _release(self) -> tuple[str, str | None]:
        if not self._stops:
            text, self._held = self._held, ""
            return text, None
        match = self._first_stop()
        if match is not None:
            start, stop = match
            text = self._held[: start + len(stop) if self._include_stop else start]
            self._held = ""
            self._pending.clear()
            return text, stop
        safe = len(self._held) - self._longest_partial_stop()
        text, self._held = self._held[:safe], self._held[safe:]
        return text, None

    def _first_stop(self) -> tuple[int, str] | None:
        """Where in the held text a stop string is complete first; of two that end together, the longer.

        Judged character by character, so that it does not depend on how the text fell into tokens.
        """
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if not found:
            return None
        _, start, stop = min(found)
        return start, stop

    def _longest_partial_stop(self) -> int:
        """Length of the longest end of the held text that begins some stop string."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:size]):
                    longest = size
                    break
        return longest


def token_starts(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[int]:
    """Where each token's text begins in the text of all, special tokens left out."""
    detokenizer, starts = IncrementalDetokenizer(tokenizer, SamplingParams()), []
    for token_id in token_ids:
        detokenizer.push([token_id])
        starts.append(detokenizer.token_start)
    return starts
