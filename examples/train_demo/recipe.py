"""The knobs of a training run and the schedules driven by the share of the time budget."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """The knobs of a run; times in minutes, learning rates at the plateau of the schedule."""

    minutes: float = 65.0
    vocab_size: int = 4096
    tokens_per_step: int = 4096
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    router_lr: float = 2e-3
    weight_decay: float = 0.1
    balance: float = 0.01
    z_loss: float = 1e-3
    clip: float = 1.0
    warmup: float = 0.02
    decay: float = 0.40
    first_save: float = 1.0
    save_every: float = 8.0
    seed: int = 20


def sequence_length(done: float) -> int:
    """Row length in tokens after a share ``done`` of the budget: short first, long last."""
    if done < 0.50:
        return 256
    return 512 if done < 0.85 else 1024


def chat_share(done: float, decay: float) -> float:
    """Share of rows that hold chats: 12 %, and 25 % while the learning rate decays."""
    return 0.12 if done < 1 - decay else 0.25


def schedule(done: float, warmup: float, decay: float) -> float:
    """Trapezoid: linear warm-up, plateau at 1, linear decay to 0 over the last ``decay``."""
    return max(0.0, min(1.0, (done + 1e-3) / warmup, (1 - done) / decay))
