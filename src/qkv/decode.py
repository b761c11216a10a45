"""Decoding: from a model's next-token logits to sequences of ids.

`sample` steps through a batch and yields each token as it is drawn; `beam_search` looks for the most
probable sequences; `generate` runs whichever the options ask for. Both continue the prompts of a GPT,
or translate the sources of a Transformer. Everything is ids: text is the pipelines' business.

Legend: N sequences, V vocabulary, K beams, C candidates of a sequence's beams, T tokens of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

import torch
from torch import Tensor

from qkv.attention import Cache
from qkv.config import Decoding as Decoding
from qkv.errors import InputError
from qkv.models.gpt import GPT
from qkv.models.transformer import Transformer
from qkv.ragged import Ragged, pack

Decoder = GPT | Transformer
"""A model that says what comes next."""

Finish = Literal["eos", "length", "context"]
"""Why a sequence ended: with an end token, at `max_new_tokens`, or where the model's context is full."""


@dataclass(frozen=True)
class Token:
    """One new token of one sequence."""

    sequence: int
    """Sample s of input i is sequence i * num_return_sequences + s."""
    id: int
    finish: Finish | None
    """Why this is the sequence's last token; None: more will come."""


@dataclass(frozen=True)
class Hypothesis:
    """A whole answer."""

    ids: list[int]
    """The new tokens only, an end token among them."""
    finish: Finish
    score: float | None = None
    """Beam search's log-probability / length ** length_penalty."""


# ---------------------------------------------------------------- scores


def filter_logits(logits: Tensor, decoding: Decoding) -> Tensor:
    """Logits (N, V) of the distribution that is drawn from: tokens cut off are -inf.

    Temperature, then top_k, top_p and min_p, each on what the one before left. Temperature is positive.
    """
    # The largest becomes 0, so that no temperature makes it overflow.
    logits = (logits - logits.amax(-1, keepdim=True)) / decoding.temperature
    if 0 < decoding.top_k < logits.shape[-1]:
        least = logits.topk(decoding.top_k).values[:, -1:]  # (N, 1)
        logits = logits.masked_fill(logits < least, -math.inf)
    if decoding.top_p < 1:
        ordered, index = logits.sort(descending=True)  # (N, V)
        probability = ordered.softmax(-1)
        likelier = probability.cumsum(-1) - probability  # of all tokens before this one
        cut = torch.zeros_like(logits, dtype=torch.bool).scatter(1, index, likelier >= decoding.top_p)
        logits = logits.masked_fill(cut, -math.inf)
    if decoding.min_p > 0:
        logits = logits.masked_fill(logits < math.log(decoding.min_p), -math.inf)
    return logits


def penalise(scores: Tensor, history: Ragged, penalty: float) -> Tensor:
    """Scores (N, V), those of past ids, history (T,), made worse: s / penalty, or s * penalty if s < 0."""
    where = (history.layout.owner, history.values)
    past = scores[where]  # (T,)
    return scores.index_put(where, torch.where(past < 0, past * penalty, past / penalty))


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Ids (N,) where the cumulative distributions of logits (N, V) pass float64 uniforms (N,) from [0, 1)."""
    cumulative = logits.double().softmax(-1).cumsum(-1)  # (N, V)
    return torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)[:, 0]


# ---------------------------------------------------------------- what both searches share


def _begin(model: Decoder, inputs: Sequence[Sequence[int]]) -> tuple[Cache, list[list[int]]]:
    """An empty cache of the inputs, and the ids that their answers continue."""
    kind = "prompt" if isinstance(model, GPT) else "source"
    for i, ids in enumerate(inputs):
        if not ids:
            raise InputError(f"{kind} {i} has no tokens; give at least one")
        if len(ids) > model.config.context:
            raise InputError(
                f"{kind} {i} has {len(ids)} tokens; the model's context is {model.config.context}: shorten it"
            )
    if isinstance(model, GPT):
        return model.start(len(inputs)), [list(ids) for ids in inputs]
    return model.start(pack(inputs, model.tokens.weight.device)), [[model.config.pad_id] for _ in inputs]


def _limit(model: Decoder, prompt: Sequence[int], decoding: Decoding) -> tuple[int, Finish]:
    """How many tokens may follow, and what ends them there. The last is never read, so it needs no room."""
    room = model.config.context - len(prompt) + 1
    return (decoding.max_new_tokens, "length") if decoding.max_new_tokens <= room else (room, "context")


def _ban(model: Decoder, scores: Tensor) -> Tensor:
    """Scores (N, V) without the ids that no answer may contain."""
    if isinstance(model, GPT):
        return scores
    return scores.index_fill(1, torch.tensor([model.config.pad_id], device=scores.device), -math.inf)


def _read(model: Decoder, sequences: Iterable[Sequence[int]], cache: Cache) -> Tensor:
    """Logits (N, V) after more ids of every sequence in the cache, in float32."""
    return model.next_logits(pack(sequences, cache.device), cache).float()


# ---------------------------------------------------------------- sampling


@torch.inference_mode()
def sample(
    model: Decoder, inputs: Sequence[Sequence[int]], decoding: Decoding, eos: Collection[int] = ()
) -> Iterator[Token]:
    """Draw tokens step by step; each step yields one token of every unfinished sequence, in order.

    inputs: ids of a GPT's prompts or a Transformer's sources. eos: ids that end a sequence. A finished
    sequence leaves the batch. What is drawn depends on an input's ids, the seed and the sample's number,
    not on the other inputs. Raises InputError for an input that is empty or longer than the context.
    """
    if not inputs:
        return
    cache, prompts = _begin(model, inputs)
    logits = _read(model, prompts, cache)  # (N, V)
    pairs = [(i, s) for i in range(len(inputs)) for s in range(decoding.num_return_sequences)]
    origin = [i for i, _ in pairs]
    if decoding.num_return_sequences > 1:
        cache.select(origin)
        logits = logits[origin]
    live = list(range(len(pairs)))  # the sequences in the batch
    history = [list(prompts[i]) for i in origin]
    generators = [Random(repr((decoding.seed, s, list(inputs[i])))) for i, s in pairs]
    limits = [_limit(model, prompts[i], decoding) for i in origin]
    for made in range(1, decoding.max_new_tokens + 1):
        if decoding.repetition_penalty != 1:
            past = pack((history[i] for i in live), cache.device)
            logits = penalise(logits, past, decoding.repetition_penalty)
        logits = _ban(model, logits)
        if decoding.temperature == 0:
            ids = logits.argmax(-1)  # (N,)
        else:
            uniforms = [generators[i].random() for i in live]
            chances = torch.tensor(uniforms, dtype=torch.float64, device=cache.device)
            ids = draw(filter_logits(logits, decoding), chances)
        kept: list[tuple[int, int]] = []  # row in the batch, and id
        for row, (sequence, id) in enumerate(zip(live, ids.tolist(), strict=True)):
            history[sequence].append(id)
            limit, reason = limits[sequence]
            finish: Finish | None = "eos" if id in eos else reason if made == limit else None
            yield Token(sequence, id, finish)
            if finish is None:
                kept.append((row, id))
        if not kept:
            return
        if len(kept) < len(live):
            cache.select([row for row, _ in kept])
            live = [live[row] for row, _ in kept]
        logits = _read(model, ([id] for _, id in kept), cache)


# ---------------------------------------------------------------- beam search


@dataclass(frozen=True)
class _Beam:
    """A sequence in the making. A dead one (-inf) only fills a place while there are fewer than K."""

    ids: list[int]
    score: float
    parent: int
    """Row of the batch that it continues."""


@torch.inference_mode()
def beam_search(
    model: Decoder, inputs: Sequence[Sequence[int]], decoding: Decoding, eos: Collection[int] = ()
) -> list[list[Hypothesis]]:
    """For each input its `num_return_sequences` best answers, best first (Sutskever et al. 2014, 3.2).

    Arguments and errors as for `sample`. An input is done when it has K finished answers and its best
    unfinished one scores, at its present length, no better than the worst of them.
    """
    if not inputs:
        return []
    K = decoding.num_beams
    cache, prompts = _begin(model, inputs)
    logits = _read(model, prompts, cache).repeat_interleave(K, 0)  # (N K, V)
    cache.select([i for i in range(len(inputs)) for _ in range(K)])
    limits = [_limit(model, prompt, decoding) for prompt in prompts]
    found: list[list[Hypothesis]] = [[] for _ in inputs]
    start = [0.0] + [-math.inf] * (K - 1)  # one beam, so that the first step does not choose K times the same
    beams = {i: [_Beam([], score, i * K) for score in start] for i in range(len(inputs))}
    for made in range(1, decoding.max_new_tokens + 1):
        scores = logits.log_softmax(-1)  # (N K, V)
        if decoding.repetition_penalty != 1:
            past = pack((prompts[i] + b.ids for i in beams for b in beams[i]), cache.device)
            scores = penalise(scores, past, decoding.repetition_penalty)
        so_far = torch.tensor([b.score for i in beams for b in beams[i]], device=cache.device)  # (N K,)
        scores = (_ban(model, scores) + so_far[:, None]).view(len(beams), -1)  # (N, K V)
        # Even if every beam's likeliest continuation ends it, K others remain.
        C = min(K * max(2, 1 + len(eos)), scores.shape[1])
        best, places = (x.tolist() for x in scores.topk(C))
        following: dict[int, list[_Beam]] = {}
        for row, (i, old) in enumerate(beams.items()):
            limit, reason = limits[i]
            new: list[_Beam] = []
            for rank, (score, place) in enumerate(zip(best[row], places[row], strict=True)):
                k, id = divmod(place, logits.shape[1])
                if score == -math.inf or len(new) == K:
                    break
                ids = [*old[k].ids, id]
                if id not in eos and made < limit:
                    new.append(_Beam(ids, score, row * K + k))
                elif rank < K:
                    finish = "eos" if id in eos else reason
                    found[i].append(Hypothesis(ids, finish, score / made**decoding.length_penalty))
            found[i] = sorted(found[i], key=_score, reverse=True)[:K]
            hope = new[0].score / made**decoding.length_penalty if new else -math.inf
            if new and (len(found[i]) < K or hope > _score(found[i][-1])):
                following[i] = new + [_Beam(new[0].ids, -math.inf, new[0].parent)] * (K - len(new))
        beams = following
        if not beams:
            break
        chosen = [b for i in beams for b in beams[i]]
        cache.select([b.parent for b in chosen])
        logits = _read(model, (b.ids[-1:] for b in chosen), cache)
    return [answers[: decoding.num_return_sequences] for answers in found]


def _score(hypothesis: Hypothesis) -> float:
    assert hypothesis.score is not None
    return hypothesis.score


# ---------------------------------------------------------------- all at once


def generate(
    model: Decoder, inputs: Sequence[Sequence[int]], decoding: Decoding, eos: Collection[int] = ()
) -> list[list[Hypothesis]]:
    """For each input its `num_return_sequences` answers, by beam search if there are beams, else by sampling.

    Arguments and errors as for `sample`.
    """
    if decoding.num_beams > 1:
        return beam_search(model, inputs, decoding, eos)
    S = decoding.num_return_sequences
    ids: list[list[int]] = [[] for _ in range(len(inputs) * S)]
    ends: dict[int, Finish] = {}
    for token in sample(model, inputs, decoding, eos):
        ids[token.sequence].append(token.id)
        if token.finish is not None:
            ends[token.sequence] = token.finish
    answers = [Hypothesis(ids[i], ends[i]) for i in range(len(ids))]
    return [answers[i : i + S] for i in range(0, len(answers), S)]
