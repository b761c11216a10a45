"""The decoding engine: many requests at once, each at its own place, in one model's slots.

A step reads the new tokens of all answers in the making in one call of the model. Requests come and go
between steps (continuous batching: Yu et al. 2022, "Orca").

Legend: R rows of logits, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from qkv.errors import InputError
from qkv.kv_cache import ROWS
from qkv.sampling import adjust, choose, distribution, verify
from qkv.search import Beams, Continuation, Request, Search, Stream, Token, best_continuations
from qkv.slots import Ahead, Decoder, Slots
from qkv.speculate import Draft, LookUp

Item = TypeVar("Item")

STEP_TOKENS = 4096
"""Most tokens of prompts and sources that a step begins with, which bounds its memory; a longer one goes
alone."""


@dataclass
class Counts:
    """What an engine has done so far."""

    steps: int = 0
    """Calls of the model."""
    reused: int = 0
    """Tokens of prompts and sources that were in the cache already."""
    guessed: int = 0
    """Tokens guessed ahead and checked."""
    accepted: int = 0
    """Those of them that were right."""


class Engine:
    """Answers requests, each as if it were alone.

    There are as many answers in the making as slots; further ones wait, in the order in which they came.
    A request of `num_return_sequences` samples takes a slot for each, a beam search one. A slot remembers
    its last text, so that a prompt which begins like a text in any slot is read from where they part. The
    cache holds at most slots x context tokens (beams of one input may need more rows than the context).
    The model's weights must not change meanwhile.
    """

    def __init__(
        self, model: Decoder, slots: int = 16, draft: Decoder | None = None, rows: int = ROWS
    ) -> None:
        """draft: a smaller model that guesses for the requests that speculate; None: guesses are looked up.
        rows: tokens of each text that the cache has room for before it grows.

        Raises InputError without slots, for models in training mode, and for a draft that does not fit.
        """
        if model.training or (draft is not None and draft.training):
            raise InputError("a model in training mode answers with dropout: call its eval() first")
        if slots < 1:
            raise InputError(f"an engine of {slots} slots answers nothing: give it at least one")
        self.model = model
        self.counts = Counts()
        self._slots = Slots(model, slots, rows)
        self._guesser = LookUp() if draft is None else Draft(draft, model, slots, rows)
        self._waiting: deque[Search] = deque()
        self._live: list[Search] = []
        self._free = list(range(slots))  # the longest unused first
        self._said: list[Token] = []  # not given out yet
        self._submitted = 0

    @property
    def busy(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self._live or self._waiting or self._said)

    @property
    def computed(self) -> int:
        """Tokens of prompts, sources and answers that the model has read so far."""
        return self._slots.computed

    def submit(self, request: Request) -> int:
        """Take a request in; its number, which its tokens carry: 0 for the first.

        Raises InputError for an input that is empty, longer than the context, or not of the vocabulary.
        """
        number = self._submitted
        if request.decoding.num_beams > 1:
            self._waiting.append(Beams(self.model, request, number))
        else:
            answers = range(request.decoding.num_return_sequences)
            self._waiting += [Stream(self.model, request, number, answer) for answer in answers]
        self._submitted += 1
        return number

    def cancel(self, number: int, answer: int | None = None) -> None:
        """Drop a request, or one of its samples, if it is not done; its slots are free at once."""

        def meant(search: Search) -> bool:
            one = answer is None or (isinstance(search, Stream) and search.answer == answer)
            return search.number == number and one

        self._waiting = deque(search for search in self._waiting if not meant(search))
        self._leave([search for search in self._live if meant(search)])

    def run(self) -> Iterator[Token]:
        """All tokens still to come, step by step."""
        while self.busy:
            yield from self.step()

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """Let every answer go on by a token, or several if some were guessed: the new tokens, by request.

        A beam search gives all tokens of its answers, best first, when it is done. What was found before an
        exception comes with the next step.
        """
        if self._live or self._waiting:
            self._go_on()
        said, self._said = self._said, []
        self.counts.accepted += sum(token.guessed for token in said)
        return said

    def _go_on(self) -> None:
        twins = self._admit()
        readers = [search for search in self._live if search not in twins]
        streams = [search for search in readers if isinstance(search, Stream) and search.room > 0]
        self._guesser.guess(streams)
        ahead, places = self._slots.read({search.slot: search.reading() for search in readers})
        rows = {search: places[search.slot] for search in readers}
        for twin, other in twins.items():
            self._slots.copy(other.slot, twin.slot, len(twin.prompt))
            rows[twin] = rows[other][:1]
        ahead.prepare(row for search in self._live if search.weighs for row in rows[search])
        chosen, continuations = self._choose(ahead, rows), self._continuations(ahead, rows)
        self.counts.guessed += sum(len(stream.guesses) for stream in streams)
        try:
            for search in self._live:
                logits = ahead.logits(rows[search]) if search.decoding.logprobs else None
                if isinstance(search, Stream):
                    self._said += search.take(chosen[search], logits)
                else:
                    assert isinstance(search, Beams)
                    self._said += search.take(continuations[search], logits)
        finally:
            self._leave([search for search in self._live if search.done])
        self.counts.steps += 1

    def _admit(self) -> dict[Search, Search]:
        """Give free slots to those who wait.

        Returns those who need not read, because another one that came with them begins with the same text.
        """
        twins: dict[Search, Search] = {}
        newcomers: list[Search] = []
        budget = STEP_TOKENS
        while self._waiting and self._free:
            search = self._waiting[0]
            cost = len(search.prompt) + len(search.source)
            same = (n for n in newcomers if (n.prompt, n.source) == (search.prompt, search.source))
            twin = next(same, None)
            if twin is not None:
                twins[search] = twin
                search.slot = self._free.pop(0)
                self.counts.reused += cost
            else:
                if newcomers and cost > budget:
                    break
                budget -= cost
                newcomers.append(search)
                self._place(search)
            self._live.append(self._waiting.popleft())
        return twins

    def _place(self, search: Search) -> None:
        """Choose the slot whose last text saves the most, or copy from one in use that saves more."""
        reading = search.reading()
        slot = max(self._free, key=lambda free: self._slots.saved(free, reading))
        self._slots.borrow(slot, reading, (other.slot for other in self._live))
        self._free.remove(slot)
        search.slot = slot
        self.counts.reused += self._slots.saved(slot, reading)

    def _choose(self, ahead: Ahead, rows: dict[Search, range]) -> dict[Search, list[int]]:
        """What may follow each stream's rows, by its logits and random numbers."""
        streams = sorted((s for s in rows if isinstance(s, Stream)), key=lambda s: rows[s].start)
        chosen: dict[Search, list[int]] = {}
        for stream in (s for s in streams if s.draft):
            n = range(stream.made, stream.made + len(stream.guesses) + 1)
            chosen[stream] = verify(
                distribution(ahead.logits(rows[stream]), stream.rows()),
                torch.stack(stream.draft),
                stream.guesses,
                [stream.chances[i] for i in n[:-1]],
                [stream.uniforms[i] for i in n],
            )
        # Guesses that were not drawn are right where they are what is drawn anyway.
        greedy = [stream for stream in streams if stream.greedy and not stream.draft]
        ids = self._likeliest(
            ahead, [(row, s.banned(s.made + n)) for s in greedy for n, row in enumerate(rows[s])]
        )
        chosen |= {stream: [next(ids) for _ in rows[stream]] for stream in greedy}
        if sampling := [stream for stream in streams if not stream.greedy and not stream.draft]:
            places = [row for stream in sampling for row in rows[stream]]
            settings = [row for stream in sampling for row in stream.rows()]
            ids = iter(choose(ahead.logits(places), settings))
            chosen |= {stream: [next(ids) for _ in rows[stream]] for stream in sampling}
        return chosen

    def _likeliest(self, ahead: Ahead, asked: Sequence[tuple[int, tuple[int, ...]]]) -> Iterator[int]:
        """The likeliest token of each row that is none of those that are banned there."""
        chosen: dict[tuple[int, tuple[int, ...]], int] = {}
        for count, group in _groups(asked, [1 + len(banned) for _, banned in asked]):
            ids = ahead.best([row for row, _ in group], count)
            for (row, banned), best in zip(group, ids.tolist(), strict=True):
                chosen[row, banned] = next(id for id in best if id not in banned)
        return (chosen[one] for one in asked)

    def _continuations(self, ahead: Ahead, rows: dict[Search, range]) -> dict[Search, list[Continuation]]:
        """What may follow the beams of each search, best first."""
        found: dict[Search, list[Continuation]] = {}
        plain: list[Beams] = []
        for search in (s for s in rows if isinstance(s, Beams)):
            if search.penalised:
                scores = adjust(ahead.logits(rows[search]).log_softmax(-1), search.settings())
                best = scores.topk(min(search.candidates, scores.shape[1]))
                found[search] = best_continuations([search], best.values.cpu(), best.indices.cpu())[0]
            else:
                plain.append(search)
        counts = [search.candidates + len(search.banned(search.made)) for search in plain]
        for count, group in _groups(plain, counts):
            places = [row for search in group for row in rows[search]]
            scores, ids = (best.cpu() for best in ahead.likeliest(places, count))
            found |= zip(group, best_continuations(group, scores, ids), strict=True)
        return found

    def _leave(self, searches: Sequence[Search]) -> None:
        self._free += [search.slot for search in searches]
        self._live = [search for search in self._live if search not in searches]


def _groups(items: Sequence[Item], counts: Sequence[int]) -> list[tuple[int, list[Item]]]:
    """Items that ask for as many of the likeliest tokens.

    Which of two equal logits comes first may depend on that number, and so must not depend on other requests.
    """
    groups: dict[int, list[Item]] = {}
    for item, count in zip(items, counts, strict=True):
        groups.setdefault(count, []).append(item)
    return list(groups.items())
