"""Training and held-out data of the demo model, read from a folder outside the repository."""

import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from examples.train_demo.chats import Chat, gsm8k_chats, passage_chats, simple_chats
from examples.train_demo.tokenizer import END_OF_TEXT

HELD_OUT_TEXT = 0.02
"""Share of every book, from its end, that is never trained on."""
HELD_OUT_CHATS = 150
"""Number of GSM8K rows, from the end of the file, that are never trained on."""


@dataclass(frozen=True)
class Book:
    """One book, split by character position."""

    title: str
    author: str
    train: str
    held_out: str


@dataclass(frozen=True)
class Corpus:
    """Everything the demo model may see, and what is kept from it."""

    books: list[Book]
    simple: list[Chat]
    passages: list[Chat]
    gsm8k: list[Chat]
    gsm8k_held_out: list[Chat]


def clean(text: str) -> str:
    """Unix line ends, no trailing blanks, at most one empty line in a row."""
    text = re.sub(r"[ \t]+\n", "\n", text.replace("\r\n", "\n").replace("\r", "\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def read_book(path: Path) -> Book:
    """Read ``Author__Title.md`` and cut off its held-out end."""
    text = clean(path.read_text(encoding="utf-8"))
    author, title = (part.replace("_", " ") for part in path.stem.split("__"))
    cut = int(len(text) * (1 - HELD_OUT_TEXT))
    return Book(title, author, text[:cut], text[cut:])


def read_corpus(folder: Path, seed: int = 0) -> Corpus:
    """Load books and GSM8K from the shared data folder and make the chat examples."""
    books = [read_book(path) for path in sorted((folder / "text/classic_books").glob("*.md"))]
    gsm8k = gsm8k_chats(folder / "prompts/gsm8k_train.jsonl")
    rng = random.Random(seed)
    passages = [chat for b in books for chat in passage_chats(b.title, b.author, b.train, 120, rng)]
    return Corpus(
        books=books,
        simple=simple_chats([(b.title, b.author) for b in books]),
        passages=passages,
        gsm8k=gsm8k[:-HELD_OUT_CHATS],
        gsm8k_held_out=gsm8k[-HELD_OUT_CHATS:],
    )


def render(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat as text, through the tokenizer's own template."""
    return str(tokenizer.apply_chat_template(chat, tokenize=False))


def encode_text(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """All training books as one stream of token ids [tokens], an end-of-text mark after each."""
    ids = tokenizer([book.train + END_OF_TEXT for book in corpus.books])["input_ids"]
    return torch.tensor([token for book in ids for token in book])


def encode_chats(chats: list[Chat], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of every chat, each closed by an end-of-text mark."""
    texts = [render(chat, tokenizer) + END_OF_TEXT for chat in chats]
    return [list(ids) for ids in tokenizer(texts)["input_ids"]]


class TextRows:
    """Endless rows from the book stream: each pass visits every window once, in random order."""

    def __init__(self, stream: Tensor, rng: torch.Generator) -> None:
        self._stream = stream
        self._rng = rng
        self._length = 0
        self._starts: list[int] = []

    def take(self, count: int, length: int) -> Tensor:
        """``count`` rows of ``length`` + 1 tokens: [count, length + 1]."""
        if length != self._length:
            self._length, self._starts = length, []
        rows = [self._row(length) for _ in range(count)]
        return torch.stack(rows) if rows else torch.empty(0, length + 1, dtype=torch.long)

    def _row(self, length: int) -> Tensor:
        if not self._starts:
            phase = int(torch.randint(length, (1,), generator=self._rng))
            starts = torch.arange(phase, self._stream.numel() - length - 1, length)
            order = torch.randperm(starts.numel(), generator=self._rng)
            self._starts = starts[order].tolist()
        start = self._starts.pop()
        return self._stream[start : start + length + 1]


class ChatRows:
    """Endless rows packed with whole chats; a row starts at a chat and cuts its last one."""

    def __init__(self, sources: list[list[list[int]]], weights: list[float], rng: torch.Generator) -> None:
        self._sources = sources
        self._weights = torch.tensor(weights)
        self._rng = rng

    def take(self, count: int, length: int) -> Tensor:
        """``count`` rows of ``length`` + 1 tokens: [count, length + 1]."""
        rows = [self._row(length) for _ in range(count)]
        return torch.stack(rows) if rows else torch.empty(0, length + 1, dtype=torch.long)

    def _row(self, length: int) -> Tensor:
        row: list[int] = []
        while len(row) <= length:
            kind = int(torch.multinomial(self._weights, 1, generator=self._rng))
            source = self._sources[kind]
            row += source[int(torch.randint(len(source), (1,), generator=self._rng))]
        return torch.tensor(row[: length + 1])


class Mixture:
    """Batches of book rows and chat rows."""

    def __init__(self, text: TextRows, chats: ChatRows, rng: torch.Generator) -> None:
        self._text = text
        self._chats = chats
        self._rng = rng

    def batch(self, tokens: int, length: int, chat_share: float) -> Tensor:
        """[tokens // length, length + 1] ids; each row is a chat row with ``chat_share``."""
        rows = tokens // length
        chats = int((torch.rand(rows, generator=self._rng) < chat_share).sum())
        parts = [self._text.take(rows - chats, length), self._chats.take(chats, length)]
        return torch.cat(parts)


def build_mixture(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, seed: int) -> Mixture:
    """Tokenise the corpus once and make the batch source of the training run."""
    rng = torch.Generator().manual_seed(seed)
    sources = [encode_chats(chats, tokenizer) for chats in (corpus.gsm8k, corpus.passages, corpus.simple)]
    # Weights count chats, and the simple ones are about eight times shorter than the others.
    chats = ChatRows(sources, [0.40, 0.15, 0.45], rng)
    return Mixture(TextRows(encode_text(corpus, tokenizer), rng), chats, rng)
