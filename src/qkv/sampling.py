"""Choosing tokens: from a model's logits to ids, each row by the settings of its own request.

Legend: R rows of logits, V vocabulary, T tokens of their histories, M guessed tokens.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qkv.config import Decoding
from qkv.ragged import Ragged, pack, rows_of


class Row(NamedTuple):
    """What one next token is chosen by, besides its logits."""

    decoding: Decoding
    history: Sequence[int]
    """The text so far, whose tokens the repetition penalty makes less likely; empty if there is none."""
    banned: Collection[int]
    """Ids that may not come next."""
    uniform: float
    """Decides what is drawn, from [0, 1)."""


def choose(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    """The next token of each row of logits (R, V): drawn, or the likeliest where temperature is 0."""
    chosen = [0] * len(rows)
    for indices in _alike(rows):
        group = [rows[i] for i in indices]
        scores = adjust(rows_of(logits, indices), group)
        if group[0].decoding.temperature == 0:
            ids = scores.argmax(-1)
        else:
            uniforms = torch.tensor([row.uniform for row in group], dtype=torch.float64, device=scores.device)
            ids = draw(filter_logits(scores, group[0].decoding).exp(), uniforms)
        for i, id in zip(indices, ids.tolist(), strict=True):
            chosen[i] = id
    return chosen


def distribution(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """The distributions that `choose` draws from, for rows of one request: float64 (R, V).

    Temperature is positive.
    """
    return filter_logits(adjust(logits, rows), rows[0].decoding).double().softmax(-1)


def _alike(rows: Sequence[Row]) -> list[list[int]]:
    """Indices of rows that one call can choose."""
    groups: dict[tuple[float, ...], list[int]] = {}
    for i, row in enumerate(rows):
        d = row.decoding
        key = (d.temperature, d.top_k, d.top_p, d.min_p, d.repetition_penalty)
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def adjust(scores: Tensor, rows: Sequence[Row]) -> Tensor:
    """Scores (R, V) after the repetition penalty, which is the same for all rows, and bans."""
    if (penalty := rows[0].decoding.repetition_penalty) != 1:
        scores = penalise(scores, pack((row.history for row in rows), scores.device), penalty)
    banned = [(i, id) for i, row in enumerate(rows) for id in row.banned]
    if banned:
        where = torch.tensor(banned, device=scores.device).unbind(1)
        scores = scores.index_put(where, scores.new_tensor(-math.inf))
    return scores


def penalise(scores: Tensor, history: Ragged, penalty: float) -> Tensor:
    """Scores (R, V), those of past ids, history (T,), made worse: s / penalty, or s * penalty if s < 0."""
    where = (history.layout.owner, history.values)
    past = scores[where]  # (T,)
    return scores.index_put(where, torch.where(past < 0, past * penalty, past / penalty))


def filter_logits(logits: Tensor, decoding: Decoding) -> Tensor:
    """Logits (R, V) of the distribution that is drawn from: the largest is 0, tokens cut off are -inf.

    Temperature, then top_k, top_p and min_p, each on what the one before left. Temperature is positive.
    """
    # The largest becomes 0, so that no temperature makes it overflow.
    logits = (logits - logits.amax(-1, keepdim=True)) / decoding.temperature
    if 0 < decoding.top_k < logits.shape[-1]:
        least = logits.topk(decoding.top_k).values[:, -1:]  # (R, 1)
        logits = logits.masked_fill(logits < least, -math.inf)
    if decoding.top_p < 1:
        logits = logits.masked_fill(~_nucleus(logits.softmax(-1), decoding.top_p), -math.inf)
    if decoding.min_p > 0:
        logits = logits.masked_fill(logits < math.log(decoding.min_p), -math.inf)
    return logits


NUCLEUS = 256
"""For top_p so many of the likeliest tokens are looked at, and more if these are too few: to sort a large
vocabulary takes longer than a step of a small model."""


def _nucleus(probability: Tensor, top_p: float) -> Tensor:
    """Of probabilities (R, V), the fewest that make top_p together, as bool (R, V).

    All that are as likely as the least likely of these are kept too: which of them `topk` puts first depends
    on its size, and so on other rows.
    """
    size = min(NUCLEUS, probability.shape[-1])
    while True:
        best = probability.topk(size)
        together = best.values.cumsum(-1)  # (R, size)
        if size == probability.shape[-1] or bool((together[:, -1] >= top_p).all()):
            break
        size = min(16 * size, probability.shape[-1])
    likelier = together - best.values  # of all tokens before this one
    kept = (likelier < top_p).sum(-1, keepdim=True).clamp(min=1)  # (R, 1)
    return probability >= best.values.gather(1, kept - 1)


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Ids (R,), in proportion to weights (R, V), not all zero.

    Each is the first whose cumulative weight passes uniforms (R,), float64 from [0, 1), of the total; of
    weights that are NaN, which nothing passes, the last.
    """
    cumulative = weights.cumsum(-1, dtype=torch.float64)  # (R, V)
    places = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return places.clamp(max=weights.shape[-1] - 1)


def verify(
    target: Tensor, draft: Tensor, guesses: Sequence[int], chances: Sequence[float], uniforms: Sequence[float]
) -> list[int]:
    """Tokens with the target's distribution, from guesses that were drawn from the draft's.

    Leviathan et al. 2023, algorithm 1: guess x is kept with probability min(1, p(x) / q(x)); the first one
    that is not gives way to a draw from max(0, p - q), and after all M comes one more from p.

    target p (M + 1, V), draft q (M, V), both float64 probabilities; chances (M,) decide what is kept and
    uniforms (M + 1,) what is drawn, all from [0, 1). Returns 1 to M + 1 ids.
    """
    draft = draft.to(target.device)  # a small model may be elsewhere
    last = torch.tensor([uniforms[len(guesses)]], dtype=torch.float64, device=target.device)
    for i, guess in enumerate(guesses):
        p, q = target[i], draft[i]
        if chances[i] * float(q[guess]) >= float(p[guess]):
            rest = (p - q).clamp(min=0)
            # Where rounding alone tells p from q, nothing is left of their difference.
            rest = rest if bool(rest.any()) else p
            return [*guesses[:i], int(draw(rest[None], last.fill_(uniforms[i])))]
    return [*guesses, int(draw(target[-1:], last))]
