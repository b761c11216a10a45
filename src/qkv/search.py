"""Answers in the making: what a request wants read next, and what it makes of the logits.

A `Stream` is one answer, drawn token by token; `Beams` looks for the likeliest answers. Either has one
slot of the engine, and knows nothing of the others.

Legend: V vocabulary, K beams, C candidates for the next beams, M guessed tokens, W rows of a slot in use.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qkv.config import Decoding
from qkv.errors import InputError
from qkv.kv_cache import Branches
from qkv.models.gpt import GPT
from qkv.sampling import Row
from qkv.slots import Decoder, Reading

Finish = Literal["eos", "stop", "length", "context"]
"""Why an answer ended: with an end token, before a stop string (which pipelines look for), at
`max_new_tokens`, or where the model's context is full."""


@dataclass(frozen=True)
class Request:
    """What is asked of a model."""

    ids: Sequence[int]
    """A GPT's prompt or a Transformer's source."""
    decoding: Decoding
    eos: Collection[int] = ()
    """Ids that end an answer."""


class Token(NamedTuple):
    """One new token of one answer."""

    request: int
    answer: int
    """Which of the request's `num_return_sequences` answers it belongs to."""
    id: int
    finish: Finish | None = None
    """Why this is the answer's last token; None: more will come."""
    logprob: float | None = None
    """Its log-probability, if asked for."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest ids in its place with their log-probabilities, if asked for."""
    guessed: bool = False
    """Whether it was guessed ahead."""
    score: float | None = None
    """Of the last token of a beam search's answer: log-probability / length ** length_penalty."""


class Search(ABC):
    """What the engine steps through."""

    def __init__(self, model: Decoder, request: Request, number: int) -> None:
        """Raises InputError for an input that is empty, longer than the context, or not of the vocabulary."""
        kind = "prompt" if isinstance(model, GPT) else "source"
        length, context, size = len(request.ids), model.config.context, model.config.vocab_size
        if not length:
            raise InputError(f"{kind} {number} has no tokens; give at least one")
        if length > context:
            raise InputError(
                f"{kind} {number} has {length} tokens; the model's context is {context}: shorten it"
            )
        if strange := [id for id in (*request.ids, *request.eos) if not 0 <= id < size]:
            raise InputError(
                f"{kind} {number} has, or is to end at, the id {strange[0]}; the model's are 0 to {size - 1}"
            )
        self.request = request
        self.number = number
        self.decoding = request.decoding
        self.slot = -1
        self.made = 0
        """How many new tokens there are."""
        self.done = False
        if isinstance(model, GPT):
            self.source: tuple[int, ...] = ()
            self.prompt = list(request.ids)
            self._never: tuple[int, ...] = ()
        else:
            self.source = tuple(request.ids)
            self.prompt = [model.config.pad_id]
            self._never = (model.config.pad_id,)
        # The last token is never read, so it needs no room.
        room = context - len(self.prompt) + 1
        self.limit = min(self.decoding.max_new_tokens, room)
        self.penalised = self.decoding.repetition_penalty != 1
        draws = self.decoding.num_beams == 1 and self.decoding.temperature > 0
        self.weighs = draws or self.penalised or self.decoding.logprobs > 0
        """Whether it needs more than the likeliest tokens: all logits."""
        self.full: Finish = "length" if self.limit == self.decoding.max_new_tokens else "context"

    def banned(self, made: int) -> tuple[int, ...]:
        """Ids that may not follow so many new tokens."""
        return self._never + (tuple(self.request.eos) if made < self.decoding.min_new_tokens else ())

    @abstractmethod
    def reading(self) -> Reading:
        """What must be read next: at first the prompt."""


def with_logprobs(tokens: list[Token], logits: Tensor, number: int) -> list[Token]:
    """Tokens with their log-probabilities by logits (R, V), one a row, and so many of the likeliest ids."""
    scores = logits.log_softmax(-1)
    ids = torch.tensor([token.id for token in tokens], device=scores.device)
    own = scores.gather(1, ids[:, None])[:, 0].tolist()  # (R,)
    best = scores.topk(min(number, scores.shape[1]))
    tops = [
        tuple(zip(*row, strict=True)) for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    return [t._replace(logprob=x, top=top) for t, x, top in zip(tokens, own, tops, strict=True)]


# ---------------------------------------------------------------- sampling


class _Uniforms:
    """Numbers from [0, 1), one for each token of an answer: the n-th decides about token n alone."""

    def __init__(self, *key: object) -> None:
        self._random = Random(repr(key))
        self._drawn: list[float] = []

    def __getitem__(self, n: int) -> float:
        while len(self._drawn) <= n:
            self._drawn.append(self._random.random())
        return self._drawn[n]


class Stream(Search):
    """One answer, drawn token by token.

    What is drawn depends on the input's ids, the seed and the answer's number alone.
    """

    def __init__(self, model: Decoder, request: Request, number: int, answer: int) -> None:
        super().__init__(model, request, number)
        self.answer = answer
        self.greedy = self.decoding.temperature == 0 and not self.penalised
        """Whether the likeliest tokens are all that it chooses from."""
        self.ids = list(self.prompt)
        self.guesses: list[int] = []
        """Tokens to be checked in the coming step."""
        self.draft: list[Tensor] = []
        """The distributions that the guesses were drawn from, (V,) each; none: they were not drawn."""
        key = (int(request.decoding.seed), answer, [int(id) for id in request.ids])
        self.uniforms = _Uniforms(*key)
        """Decide what is drawn."""
        self.draft_uniforms = _Uniforms(*key, "draft")
        """Decide what a draft model guesses."""
        self.chances = _Uniforms(*key, "accept")
        """Decide whether a drawn guess is kept."""

    @property
    def room(self) -> int:
        """How many tokens may be guessed ahead: each step makes one more."""
        return min(self.decoding.speculate, self.limit - self.made - 1)

    def reading(self) -> Reading:
        """The text, and the guesses."""
        return Reading(self.ids + self.guesses, self.source, 1 + len(self.guesses))

    def row(self, ahead: int, uniforms: _Uniforms) -> Row:
        """What the token after so many guesses is chosen by."""
        n = self.made + ahead
        history = self.ids + self.guesses[:ahead] if self.penalised else []
        return Row(self.decoding, history, self.banned(n), uniforms[n])

    def rows(self) -> list[Row]:
        """What the tokens in the guesses' places, and the one after them, are chosen by."""
        return [self.row(ahead, self.uniforms) for ahead in range(1 + len(self.guesses))]

    def take(self, chosen: Sequence[int], logits: Tensor | None) -> list[Token]:
        """Add what was chosen in the guesses' places, up to the first that was guessed wrong.

        logits (M + 1, V): of what was chosen, if log-probabilities are asked for.
        """
        tokens: list[Token] = []
        for n, id in enumerate(chosen):
            right = self.guesses[n : n + 1] == [id]
            tokens.append(Token(self.number, self.answer, id, guessed=right))
            if not right or id in self.request.eos:
                break
        if logits is not None:
            tokens = with_logprobs(tokens, logits[: len(tokens)], self.decoding.logprobs)
        self.made += len(tokens)  # first: an interrupt makes an answer shorter, never too long
        self.ids += [token.id for token in tokens]
        self.guesses, self.draft = [], []
        ended = tokens[-1].id in self.request.eos
        finish: Finish | None = "eos" if ended else self.full if self.made == self.limit else None
        self.done = finish is not None
        if self.done:
            tokens[-1] = tokens[-1]._replace(finish=finish)
        return tokens


# ---------------------------------------------------------------- beam search


class _Beam(NamedTuple):
    """The new tokens of a text, and its log-probability."""

    tokens: tuple[Token, ...]
    score: float


class Continuation(NamedTuple):
    """A beam with one more token."""

    score: float
    beam: int
    id: int


class Beams(Search):
    """The likeliest answers (Sutskever et al. 2014, 3.2).

    The K texts are branches of a tree in one slot: what they have in common is stored and read once, and
    a step adds one row for each. The search is done when it has K finished answers and its best unfinished
    one scores, at its present length, no better than the worst of them.
    """

    def __init__(self, model: Decoder, request: Request, number: int) -> None:
        super().__init__(model, request, number)
        self.beams = [_Beam((), 0.0)]
        self.found: list[_Beam] = []
        """The best finished answers; their scores are those that they are ranked by."""
        self.rows: list[int] = []
        """Where in the slot the beams' last tokens go."""
        self.seen = np.ones((1, len(self.prompt)), dtype=bool)  # (K, W): rows that each beam attends

    def reading(self) -> Reading:
        """The last token of each beam."""
        if not self.made:
            return Reading(self.prompt, self.source)
        position = len(self.prompt) + self.made - 1
        branches = Branches(self.rows, position, torch.from_numpy(self.seen))
        last = [beam.tokens[-1].id for beam in self.beams]
        return Reading(last, self.source, len(last), branches)

    def _place(self, parents: Sequence[int]) -> None:
        """Give each new beam, beside its parent's rows, one that no beam needs any more or a new one."""
        K, seen = len(parents), self.seen[list(parents)]  # (K, W)
        W, needed = seen.shape[1], np.logical_or.reduce(seen)
        self.rows = [*(~needed).nonzero()[0].tolist(), *range(W, W + K)][:K]
        width = 1 + max(self.rows[-1], int(needed.nonzero()[0][-1]))
        self.seen = np.zeros((K, width), dtype=bool)
        self.seen[:, :W] = seen[:, :width]
        self.seen[range(K), self.rows] = True

    @property
    def candidates(self) -> int:
        """C: even if every beam's likeliest continuation ends it, K others remain."""
        return self.decoding.num_beams * max(2, 1 + len(self.request.eos))

    def settings(self) -> list[Row]:
        """What makes the beams' scores other than log-probabilities."""
        banned = self.banned(self.made)
        histories = [
            [*self.prompt, *(t.id for t in beam.tokens)] if self.penalised else [] for beam in self.beams
        ]
        return [Row(self.decoding, history, banned, 0.0) for history in histories]

    def take(self, best: Sequence[Continuation], logits: Tensor | None) -> list[Token]:
        """Choose the next beams; the answers once all are found.

        best: by `best_continuations`. logits (K, V): after the present beams, if log-probabilities are asked
        for.
        """
        K, eos = self.decoding.num_beams, self.request.eos
        going_on: list[Continuation] = []
        ended: list[Continuation] = []
        for rank, one in enumerate(best):
            if one.score == -math.inf or len(going_on) == K:
                break
            if one.id not in eos and self.made + 1 < self.limit:
                going_on.append(one)
            elif rank < K:
                ended.append(one)
        tokens = self._tokens([*going_on, *ended], logits)
        self.made += 1
        for one, token in zip(ended, tokens[len(going_on) :], strict=True):
            last = token._replace(finish="eos" if one.id in eos else self.full)
            self.found.append(_Beam((*self.beams[one.beam].tokens, last), self._rank(one.score)))
        self.found = sorted(self.found, key=lambda beam: beam.score, reverse=True)[:K]
        self.beams = [
            _Beam((*self.beams[one.beam].tokens, token), one.score)
            for one, token in zip(going_on, tokens, strict=False)
        ]
        worst = self.found[-1].score if len(self.found) == K else -math.inf
        self.done = not going_on or worst >= self._rank(going_on[0].score)
        if self.done:
            return self._answers()
        self._place([one.beam for one in going_on])
        return []

    def _tokens(self, chosen: Sequence[Continuation], logits: Tensor | None) -> list[Token]:
        tokens = [Token(self.number, 0, one.id) for one in chosen]
        if logits is None or not tokens:
            return tokens
        return with_logprobs(tokens, logits[[one.beam for one in chosen]], self.decoding.logprobs)

    def _rank(self, score: float) -> float:
        return score / float(self.made**self.decoding.length_penalty)

    def _answers(self) -> list[Token]:
        tokens: list[Token] = []
        for answer, beam in enumerate(self.found[: self.decoding.num_return_sequences]):
            last = beam.tokens[-1]._replace(score=beam.score)
            tokens += [token._replace(answer=answer) for token in (*beam.tokens[:-1], last)]
        return tokens


def best_continuations(searches: Sequence[Beams], scores: Tensor, ids: Tensor) -> list[list[Continuation]]:
    """Of each of N searches its `candidates` best, best first; the score of one that is banned is -inf.

    scores, ids (R, C): of the beams of all searches, one after the other, what follows best.
    """
    sizes, bans = [len(s.beams) for s in searches], [s.banned(s.made) for s in searches]
    total = scores.double().numpy() + np.array([[beam.score] for s in searches for beam in s.beams])
    names = ids.numpy()
    for id in {id for banned in bans for id in banned}:
        rows = np.repeat([id in banned for banned in bans], sizes)
        total[rows[:, None] & (names == id)] = -math.inf
    N, K, C = len(searches), max(sizes), names.shape[1]
    place = np.repeat(np.arange(N), sizes), np.concatenate([np.arange(size) for size in sizes])
    grid, grid_names = np.full((N, K, C), -math.inf), np.zeros((N, K, C), dtype=np.int64)
    grid[place], grid_names[place] = total, names
    flat, flat_names = grid.reshape(N, K * C), grid_names.reshape(N, K * C)
    best = np.argsort(-flat, axis=1, kind="stable")[:, : max(s.candidates for s in searches)]
    columns = np.take_along_axis(flat, best, 1), best // C, np.take_along_axis(flat_names, best, 1)
    found = zip(searches, *(column.tolist() for column in columns), strict=True)
    return [list(map(Continuation, *parts))[: search.candidates] for search, *parts in found]
