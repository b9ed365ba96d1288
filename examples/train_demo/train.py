"""Train the embedded demo model: a small Mixtral, on a CPU, within a wall-clock budget.

Run ``python -m examples.train_demo.train --data DATA --out moe_serve/demo/model``.
Everything in the schedule follows the share of the time budget that has passed, so the same
command gives a properly annealed model on a slow or a fast machine.
"""

import argparse
import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, MixtralForCausalLM, PreTrainedTokenizerBase

from examples.train_demo import experts
from examples.train_demo.architecture import build_model, model_config, save
from examples.train_demo.data import Corpus, Mixture, build_mixture, read_corpus
from examples.train_demo.losses import forward_loss
from examples.train_demo.optimizers import build_optimizers
from examples.train_demo.recipe import Recipe, chat_share, schedule, sequence_length
from examples.train_demo.tokenizer import save_tokenizer, train_tokenizer

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """What a resumed run needs to know beside the weights."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Trainer:
    """One run: model, optimisers, batches, and the clock that drives the schedule."""

    def __init__(self, model: MixtralForCausalLM, mixture: Mixture, recipe: Recipe, state: Path) -> None:
        self.model = model
        self.recipe = recipe
        self.progress = Progress()
        self._mixture = mixture
        self._state = state
        self._optimizers = build_optimizers(model, recipe)
        self._started = time.monotonic()

    def elapsed(self) -> float:
        """Training seconds so far, those before a resume included."""
        return self.progress.seconds + time.monotonic() - self._started

    def done(self) -> float:
        """Share of the time budget that has passed."""
        return self.elapsed() / (60 * self.recipe.minutes)

    def step(self) -> tuple[float, float]:
        """One optimiser step; returns nats per token and the mean balancing term."""
        recipe, done = self.recipe, self.done()
        share = chat_share(done, recipe.decay)
        batch = self._mixture.batch(recipe.tokens_per_step, sequence_length(done), share)
        total, nats, balance = forward_loss(self.model, batch, recipe)
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        factor = schedule(done, recipe.warmup, recipe.decay)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimizer.step()
            optimizer.zero_grad()
        self.progress.step += 1
        self.progress.tokens += batch[:, 1:].numel()
        return float(nats), float(balance)

    def store(self) -> None:
        """Keep fp32 weights, optimiser state and progress for a resume."""
        seconds = self.elapsed()
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "progress": {**asdict(self.progress), "seconds": seconds},
        }
        self._state.parent.mkdir(parents=True, exist_ok=True)
        partial = self._state.with_suffix(".part")
        torch.save(state, partial)
        partial.replace(self._state)

    def restore(self) -> None:
        """Continue from ``store``; the order of batches starts anew."""
        state = torch.load(self._state)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = Progress(**state["progress"])
        self._started = time.monotonic()


def run(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Step until the budget is spent, saving on the way and at the end."""
    recipe, smooth = trainer.recipe, 0.0
    next_save = max(recipe.first_save, trainer.elapsed() / 60)
    while trainer.done() < 1:
        nats, balance = trainer.step()
        smooth = 0.95 * smooth + 0.05 * nats if smooth else nats
        progress, minutes = trainer.progress, trainer.elapsed() / 60
        if progress.step % 10 == 0:
            rate = progress.tokens / (60 * minutes)
            figures = (progress.step, minutes, progress.tokens / 1e6, nats, smooth, balance, rate)
            logger.info("step %d %.1f min %.3fM tok loss %.3f (%.3f) bal %.3f %.0f tok/s", *figures)
        if minutes >= next_save:
            save(trainer.model, tokenizer, out)
            trainer.store()
            next_save = minutes + recipe.save_every
    save(trainer.model, tokenizer, out)
    trainer.store()
    logger.info("finished %s", json.dumps(asdict(trainer.progress) | {"loss": smooth}))


def get_tokenizer(corpus: Corpus, state: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """Train the tokenizer on training text only, or reuse that of an interrupted run."""
    folder = state.parent / "tokenizer"
    if not folder.exists():
        texts = [book.train for book in corpus.books]
        texts += [m["content"] for chat in corpus.gsm8k for m in chat]
        save_tokenizer(train_tokenizer(texts, vocab_size), folder)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return tokenizer


def parse_args() -> argparse.Namespace:
    """Command line of the training script."""
    parser = argparse.ArgumentParser(description="Train the embedded demo model.")
    parser.add_argument("--data", type=Path, required=True, help="Books and chats; see README.md.")
    parser.add_argument("--out", type=Path, default=Path("moe_serve/demo/model"))
    parser.add_argument("--state", type=Path, default=Path("/tmp/demo_train/state.pt"))
    parser.add_argument("--log", type=Path, default=Path("/tmp/demo_train.log"))
    parser.add_argument("--minutes", type=float, default=Recipe.minutes)
    return parser.parse_args()


def main() -> None:
    """Train, or resume where ``--state`` left off."""
    args = parse_args()
    handlers: list[logging.Handler] = [logging.FileHandler(args.log), logging.StreamHandler()]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)
    recipe = Recipe(minutes=args.minutes)
    corpus = read_corpus(args.data)
    tokenizer = get_tokenizer(corpus, args.state, recipe.vocab_size)
    config = model_config(tokenizer, recipe.balance)
    config._experts_implementation = experts.register()
    mixture = build_mixture(corpus, tokenizer, recipe.seed)
    trainer = Trainer(build_model(config, recipe.seed), mixture, recipe, args.state)
    if args.state.exists():
        trainer.restore()
    logger.info("recipe %s", json.dumps(asdict(recipe)))
    run(trainer, tokenizer, args.out)


if __name__ == "__main__":
    main()
