"""Sampler: logits of the step's last tokens -> one token per sequence, each by its own parameters.

Randomness is a pure function of (seed, sample index, position): the same request draws the same
tokens whatever else is in the batch, after a preemption, and on every device. Knows nothing of
models or scheduling.

Shape alphabet: N rows (positions where this step samples: one per sequence, and one behind each draft), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
import torch

from moe_serve.execution import best_tokens
from moe_serve.grammars.masks import Masks
from moe_serve.scheduling.batch_plan import Position
from moe_serve.scheduling.sequence import SamplingParams, TokenLogprob

MASK64 = (1 << 64) - 1
MOST_SORTED = 1024
"""Tokens that top_k may leave for the best to be sorted; otherwise they are found without (best_tokens.py)."""


def sample(
    logits: torch.Tensor,
    seqs: Rows[Position],
    default_seed: int,
    eos_token_ids: frozenset[int],
    masks: Masks | None = None,
) -> tuple[list[int], list[TokenLogprob | None]]:
    """Choose a token for each row of `logits` [N, V], within `masks`; log-probabilities where the request wants them.

    Log-probabilities are those of the raw logits, before penalties and temperature, as in vLLM.
    """
    adjusted = _adjust(logits, seqs, eos_token_ids)
    if masks is not None and masks.rows:
        adjusted = _constrain(adjusted, logits, masks)
    greedy = [i for i, s in enumerate(seqs) if s.params.is_greedy]
    random = [i for i, s in enumerate(seqs) if not s.params.is_greedy]
    tokens = [0] * len(seqs)
    if greedy:
        _scatter(tokens, greedy, _pick(adjusted, greedy).argmax(dim=-1))
    if random:
        rows = [seqs[i] for i in random]
        _scatter(tokens, random, _sample_random(_pick(adjusted, random).float(), rows, default_seed))
    return tokens, _logprobs(logits, seqs, tokens)


def _pick(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return logits if len(rows) == logits.shape[0] else logits[rows]


def _scatter(tokens: list[int], rows: list[int], chosen: torch.Tensor) -> None:
    for row, token in zip(rows, chosen.tolist(), strict=True):
        tokens[row] = token


# ---- adjustments: bias, penalties, forbidden tokens -----------------------------------------------


def _adjust(logits: torch.Tensor, seqs: Rows[Position], eos_token_ids: frozenset[int]) -> torch.Tensor:
    """A copy with each row's own adjustments, or `logits` itself when no row has any."""
    rows = [i for i, s in enumerate(seqs) if _needs_adjusting(s)]
    if not rows:
        return logits
    adjusted = logits.to(torch.float32, copy=True)
    for i in rows:
        _adjust_row(adjusted[i], seqs[i], eos_token_ids)
    return adjusted


def _needs_adjusting(seq: Position) -> bool:
    p = seq.params
    penalised = p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0
    restricted = bool(p.allowed_token_ids or p.bad_words) or seq.num_generated < p.min_tokens
    return penalised or restricted or bool(p.logit_bias)


def _adjust_row(row: torch.Tensor, seq: Position, eos_token_ids: frozenset[int]) -> None:
    """Apply one request's adjustments to its logits [V], in place."""
    params = seq.params
    if params.repetition_penalty != 1.0:
        seen = torch.from_numpy(np.unique(np.asarray(seq.token_ids))).to(row.device)
        values = row[seen]
        row[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if (params.presence_penalty or params.frequency_penalty) and seq.num_generated:
        generated = np.unique(np.asarray(seq.output_token_ids), return_counts=True)  # the host waits for no device
        ids, counts = (torch.from_numpy(found).to(row.device) for found in generated)
        row[ids] -= params.presence_penalty + params.frequency_penalty * counts
    for token_id, bias in params.logit_bias.items():
        row[token_id] += bias
    if params.allowed_token_ids:
        allowed = torch.tensor(params.allowed_token_ids, device=row.device)
        row.copy_(torch.full_like(row, float("-inf")).index_copy_(0, allowed, row[allowed]))
    _forbid(row, _forbidden(seq, eos_token_ids))


def _forbidden(seq: Position, eos_token_ids: frozenset[int]) -> set[int]:
    """Tokens that min_tokens and bad_words rule out at this position."""
    params = seq.params
    forbidden = {word[-1] for word in params.bad_words if _ends_with(seq, word[:-1])}
    if seq.num_generated < params.min_tokens:
        forbidden |= set(params.stop_token_ids) | (set() if params.ignore_eos else eos_token_ids)
    return forbidden


def _ends_with(seq: Position, ids: tuple[int, ...]) -> bool:
    return len(ids) <= seq.num_generated and tuple(seq.token_ids[seq.num_tokens - len(ids) :]) == ids


def _forbid(row: torch.Tensor, forbidden: set[int]) -> None:
    """Rule tokens out, unless that would leave none at all."""
    if not forbidden:
        return
    before = row.clone()
    row[sorted(forbidden)] = float("-inf")
    if row.max() == float("-inf"):
        row.copy_(before)


def _constrain(adjusted: torch.Tensor, logits: torch.Tensor, masks: Masks) -> torch.Tensor:
    """A copy of `adjusted` [N, V] without the tokens that grammars exclude.

    Where a request's own adjustments exclude everything that its grammar allows, they are dropped.
    """
    words = torch.from_numpy(masks.bits).to(logits.device)
    bits = words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=logits.device) & 1
    excluded = bits.flatten(1)[:, : logits.shape[1]] == 0
    kept = adjusted[masks.rows].float().masked_fill(excluded, float("-inf"))
    plain = logits[masks.rows].float().masked_fill(excluded, float("-inf"))
    is_stuck = kept.amax(dim=-1, keepdim=True) == float("-inf")
    result = adjusted.to(torch.float32, copy=True)
    result[masks.rows] = torch.where(is_stuck, plain, kept)
    return result


# ---- random sampling --------------------------------------------------------------------------------


def _sample_random(logits: torch.Tensor, seqs: Rows[Position], default_seed: int) -> torch.Tensor:
    """Inverse-CDF sampling of logits [n, V] after temperature and truncation -> [n] token ids.

    Always in vocabulary order, so that a row's draw means the same token in every batch.
    """
    logits = logits / _column([s.params.temperature for s in seqs], logits)
    probs = _truncate(torch.softmax(logits, dim=-1), [s.params for s in seqs])
    cumulative = probs.double().cumsum(dim=-1)
    draws = _column([_uniform(s, default_seed) for s in seqs], cumulative)
    # Strictly below the total, and past any leading zero: never a token of probability 0.
    chosen = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True)
    return chosen[:, 0].clamp_(max=probs.shape[1] - 1)


def _truncate(probs: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """Zero the probabilities [n, V] that top_k, top_p and min_p exclude; a row's result is its own business."""
    min_p = _column([p.min_p for p in params], probs)
    if any(p.min_p > 0.0 for p in params):
        probs = torch.where(probs < min_p * probs.amax(dim=-1, keepdim=True), 0.0, probs)
    rows_of: dict[int, list[int]] = {}
    for row, p in enumerate(params):
        if p.top_k > 0 or p.top_p < 1.0:
            rows_of.setdefault(p.top_k if 0 < p.top_k <= MOST_SORTED else 0, []).append(row)
    if rows_of:
        probs = probs.clone()
    for top_k, rows in rows_of.items():
        own = [params[row] for row in rows]
        cut = _best(probs[rows], top_k, [p.top_p for p in own]) if top_k else _best_of_many(probs[rows], own)
        probs[rows] = cut
    return probs


def _best_of_many(probs: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """As _best, where more tokens may be left than are worth sorting."""
    vocab = probs.shape[1]
    counts = [p.top_k if 0 < p.top_k < vocab else vocab for p in params]
    if min(counts) < vocab:
        probs = best_tokens.with_count(probs, torch.tensor(counts, device=probs.device)[:, None])
    if min(p.top_p for p in params) < 1.0:
        fractions = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=probs.device)
        probs = best_tokens.with_mass(probs, fractions[:, None])
    return probs


def _best(probs: torch.Tensor, top_k: int, top_p: list[float]) -> torch.Tensor:
    """`probs` [n, V] with zeros outside the `top_k` best, and outside those of them that have `top_p` [n] together."""
    best, ids = probs.topk(min(top_k, probs.shape[1]), dim=-1)
    # As transformers does: top_p counts the mass that top_k left, and keeps the token that crosses it. The total is the
    # last running sum: torch's own sum of a row depends on how many rows there are.
    mass = best.cumsum(dim=-1)
    before = mass.roll(1, dims=-1)
    before[:, 0] = 0.0
    kept = torch.where(before >= _column(top_p, probs) * mass[:, -1:], 0.0, best)
    return torch.zeros_like(probs).scatter_(1, ids, kept)


def _column(values: list[float] | list[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _uniform(seq: Position, default_seed: int) -> float:
    """A number in [0, 1) from (seed, request, sample index, position), by SplitMix64 finalisers.

    A request without a seed of its own mixes in its id, so that equal prompts differ.
    """
    params = seq.params
    seed = default_seed ^ _text_seed(seq.request.request_id) if params.seed is None else params.seed
    state = _mix(_mix(seed) ^ _mix(seq.index + 1) ^ _mix((seq.num_tokens << 1) | 1))
    return (state >> 11) / (1 << 53)


def _mix(value: int) -> int:
    """SplitMix64's output function (Steele, Lea and Flood, 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK64
    return value ^ (value >> 31)


def _text_seed(text: str) -> int:
    return int.from_bytes(text.encode()[-32:], "little") & MASK64 ^ _mix(len(text))


# ---- log-probabilities --------------------------------------------------------------------------------


def _logprobs(logits: torch.Tensor, seqs: Rows[Position], tokens: list[int]) -> list[TokenLogprob | None]:
    rows = [i for i, s in enumerate(seqs) if s.params.logprobs is not None]
    result: list[TokenLogprob | None] = [None] * len(seqs)
    if not rows:
        return result
    logprobs = logits[rows].float().log_softmax(dim=-1)
    chosen = logprobs.gather(1, torch.tensor([[tokens[i]] for i in rows], device=logits.device))[:, 0].tolist()
    wanted = [seqs[i].params.logprobs or 0 for i in rows]
    tops = _tops(logprobs, wanted)
    for i, logprob, top in zip(rows, chosen, tops, strict=True):
        result[i] = TokenLogprob(tokens[i], logprob, top)
    return result


def _tops(logprobs: torch.Tensor, wanted: list[int]) -> list[tuple[tuple[int, float], ...]]:
    """The `wanted` best tokens of each row [V] of `logprobs`, with their values.

    Of equals, which ones come first may depend on how many are asked for: rows that ask for as many ask together.
    """
    found: dict[int, tuple[tuple[int, float], ...]] = {}
    for count in set(wanted):
        rows = [row for row, own in enumerate(wanted) if own == count]
        values, ids = logprobs[rows].topk(min(count, logprobs.shape[1]))
        both = zip(ids.tolist(), values.tolist(), strict=True)
        found |= {row: tuple(zip(*pair, strict=True)) for row, pair in zip(rows, both, strict=True)}
    return [found[row] for row in range(len(wanted))]
