"""Held-out figures of the demo model beside n-gram baselines, written as JSON.

Run ``python -m examples.train_demo.evaluate --data DATA --model moe_serve/demo/model``.
"""

import argparse
import json
import logging
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    MixtralForCausalLM,
    PreTrainedTokenizerBase,
    set_seed,
)

from examples.train_demo.data import Corpus, read_corpus, render
from examples.train_demo.ngram import InterpolatedNgram
from examples.train_demo.routing import chosen_experts, layer_affinity, load_imbalance

logger = logging.getLogger(__name__)

COMPLETIONS = [
    "It was a cold morning in November, and",
    "The old captain looked at the sea and said,",
]
CHATS = [
    "Hello",
    "Who are you?",
    "Tom has 3 apples and buys 4 more. How many apples does he have?",
    "What is the capital of France?",
    "Tell me a story.",
]


def load_model(folder: Path) -> MixtralForCausalLM:
    """The saved model in fp32, ready for inference."""
    model: MixtralForCausalLM = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.train(False)
    return model


@torch.no_grad()
def token_nats(model: MixtralForCausalLM, ids: Tensor) -> Tensor:
    """Loss in nats of every token after the first, for ids [tokens]: [tokens - 1]."""
    logits = model(ids[None, :-1], use_cache=False).logits[0]
    return functional.cross_entropy(logits, ids[1:], reduction="none")


def windows(ids: Tensor, length: int, stride: int) -> Iterator[tuple[Tensor, int]]:
    """Overlapping windows of ``ids`` [tokens], and how many tokens at the end of each are new."""
    scored, end = 1, min(length + 1, len(ids))
    while scored < len(ids):
        yield ids[max(0, end - length - 1) : end], end - scored
        scored, end = end, min(end + stride, len(ids))


def text_bits(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerBase, text: str, length: int = 1024) -> float:
    """Code length of ``text`` in bits; each token sees length / 2 to length tokens before it."""
    ids = torch.tensor([tokenizer.bos_token_id, *tokenizer(text)["input_ids"]])
    nats = sum(float(token_nats(model, window)[-new:].sum()) for window, new in windows(ids, length, length // 2))
    return nats / float(np.log(2))


def bits_per_byte(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> float:
    """Total code length of ``texts`` over their UTF-8 bytes."""
    bits = sum(text_bits(model, tokenizer, text) for text in tqdm(texts, disable=None))
    return bits / sum(len(text.encode()) for text in texts)


def ngram_figures(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Bits per byte on held-out text of unigram and trigram models of bytes and of tokens."""
    train = "".join(book.train for book in corpus.books)
    held_out = [book.held_out for book in corpus.books]
    size = sum(len(text.encode()) for text in held_out)

    def of_bytes(text: str) -> Any:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)

    def of_tokens(text: str) -> Any:
        return np.array(tokenizer(text)["input_ids"], dtype=np.int64)

    figures = {}
    for name, encode, symbols in (("byte", of_bytes, 256), ("token", of_tokens, len(tokenizer))):
        stream, tests = encode(train), [encode(text) for text in held_out]
        for order, label in ((1, "unigram"), (3, "trigram")):
            model = InterpolatedNgram(stream, order, symbols)
            figures[f"{name}_{label}"] = sum(model.bits(test) for test in tests) / size
    return figures


def loss_by_position(model: MixtralForCausalLM, ids: Tensor, edges: list[int]) -> dict[str, float]:
    """Mean nats per token between position ``edges``, over windows [rows, edges[-1] + 1]."""
    nats = torch.stack([token_nats(model, row) for row in ids]).mean(dim=0)
    spans = pairwise(edges)
    return {f"{low}-{high}": float(nats[low:high].mean()) for low, high in spans}


@torch.no_grad()
def generate(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, sample: bool) -> str:
    """Up to 90 new tokens after ``prompt``, greedy or with the model's own sampling defaults."""
    set_seed(1)
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(  # type: ignore[misc]
        **inputs, max_new_tokens=90, max_length=None, do_sample=sample
    )
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))


def samples(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str | bool]]:
    """Completions and chat answers, greedy and sampled."""
    prompts = {text: text for text in COMPLETIONS}
    for text in CHATS:
        message = [{"role": "user", "content": text}]
        prompts[text] = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    return [
        {"prompt": text, "sampled": sample, "answer": generate(model, tokenizer, prompt, sample)}
        for text, prompt in prompts.items()
        for sample in (False, True)
    ]


def routing_figures(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerBase, corpus: Corpus) -> dict[str, Any]:
    """Expert load on all held-out text and on each book, and inter-layer affinity."""
    experts = model.config.num_local_experts
    books = {}
    for book in corpus.books:
        ids = torch.tensor(tokenizer(book.held_out)["input_ids"])
        books[book.title] = chosen_experts(model, ids[: len(ids) // 512 * 512].reshape(-1, 512))
    chosen = torch.cat(list(books.values()), dim=1)
    affinity = layer_affinity(chosen, experts)
    return {
        "tokens": chosen.shape[1],
        "load_max_over_mean": load_imbalance(chosen, experts),
        "load_max_over_mean_by_book": {title: load_imbalance(own, experts) for title, own in books.items()},
        "mutual_information_bits": [real for real, _ in affinity],
        "mutual_information_bits_shuffled": [shuffled for _, shuffled in affinity],
    }


def evaluate(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerBase, corpus: Corpus) -> dict[str, Any]:
    """Every figure of the model card."""
    held_out = [book.held_out for book in corpus.books]
    stream = torch.tensor([token for text in held_out for token in tokenizer(text)["input_ids"]])
    chats = [render(chat, tokenizer) for chat in corpus.gsm8k_held_out]
    long_rows = stream[: 12 * 2048].reshape(-1, 2048)
    return {
        "held_out_bytes": sum(len(text.encode()) for text in held_out),
        "held_out_tokens": len(stream),
        "bits_per_byte": {
            "model": bits_per_byte(model, tokenizer, held_out),
            "model_gsm8k": bits_per_byte(model, tokenizer, chats),
            **ngram_figures(corpus, tokenizer),
        },
        "nats_by_position": loss_by_position(model, long_rows, [0, 128, 256, 512, 1024, 2047]),
        "routing": routing_figures(model, tokenizer, corpus),
        "samples": samples(model, tokenizer),
    }


def main() -> None:
    """Evaluate a saved model folder and write the figures."""
    parser = argparse.ArgumentParser(description="Evaluate the embedded demo model.")
    parser.add_argument("--data", type=Path, required=True, help="Books and chats; see README.md.")
    parser.add_argument("--model", type=Path, default=Path("moe_serve/demo/model"))
    parser.add_argument("--out", type=Path, default=Path("/tmp/demo_evaluation.json"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    model = load_model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    figures = evaluate(model, tokenizer, read_corpus(args.data))
    args.out.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    logger.info("%s", json.dumps(figures, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
