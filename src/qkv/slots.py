"""Texts that a model has read and remembers, one in each slot of its cache.

What is asked for is always what follows whole texts; only what a slot does not hold yet is computed.

Legend: R rows of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qkv.kv_cache import ROWS, Branches
from qkv.models.gpt import GPT
from qkv.models.transformer import Transformer
from qkv.ragged import Layout, Ragged, rows_of

Decoder = GPT | Transformer
"""A model that says what comes next."""


class Reading(NamedTuple):
    """A text, whose next token is asked for."""

    ids: list[int]
    """The whole text; with branches, only their new tokens."""
    source: tuple[int, ...] = ()
    """What a Transformer's text translates."""
    wanted: int = 1
    """What may follow so many of the last ids is asked for."""
    branches: Branches | None = None
    """The slot's text goes on in several ways at once."""


class Ahead:
    """What may follow the texts that were read: R rows, of which only what is asked for is computed."""

    def __init__(self, model: Decoder, hidden: Tensor) -> None:
        """hidden: (R, D)."""
        self._model = model
        self._hidden = hidden
        self._places: dict[int, int] = {}
        self._logits: Tensor | None = None

    @torch.inference_mode()
    def prepare(self, rows: Iterable[int]) -> None:
        """Compute the logits of rows that will be asked for, all in one product."""
        self._places = {row: place for place, row in enumerate(dict.fromkeys(rows))}
        if self._places:
            self._logits = self._model.head(rows_of(self._hidden, list(self._places))).float()

    @torch.inference_mode()
    def logits(self, rows: Sequence[int]) -> Tensor:
        """Of these rows, (rows, V) in float32; if some are prepared, all must be."""
        if self._logits is None:
            return self._model.head(rows_of(self._hidden, rows)).float()
        return rows_of(self._logits, [self._places[row] for row in rows])

    @torch.inference_mode()
    def likeliest(self, rows: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
        """These rows' likeliest tokens, best first: log-probabilities and ids, (rows, count) each."""
        return self._model.likeliest(rows_of(self._hidden, rows), min(count, self._model.config.vocab_size))

    @torch.inference_mode()
    def best(self, rows: Sequence[int], count: int) -> Tensor:
        """The ids of these rows' likeliest tokens alone, best first: (rows, count)."""
        return self._model.best(rows_of(self._hidden, rows), min(count, self._model.config.vocab_size))


class Slots:
    """A model, its cache, and which texts are in it."""

    def __init__(self, model: Decoder, count: int, rows: int = ROWS) -> None:
        """rows: tokens of each text that the cache has room for before it grows."""
        self.model = model
        self.cache = model.start(count, rows)
        self.texts: list[list[int]] = [[] for _ in range(count)]
        """What each slot's first rows hold."""
        self.sources: list[tuple[int, ...]] = [()] * count
        self.computed = 0
        """Tokens that the model has read so far, those of sources among them."""

    def saved(self, slot: int, reading: Reading) -> int:
        """How many tokens of a text and its source need not be read if they follow what is in the slot."""
        return self.shared(slot, reading) + (len(reading.source) if self._same_source(slot, reading) else 0)

    def _same_source(self, slot: int, reading: Reading) -> bool:
        return self.sources[slot] == reading.source

    def shared(self, slot: int, reading: Reading) -> int:
        """How many of a text's tokens are the slot's; its last ones are not, which are asked about."""
        if not self._same_source(slot, reading):
            return 0
        text, ids = self.texts[slot], reading.ids
        size = min(len(text), len(ids) - reading.wanted)
        if text[:size] == ids[:size]:
            return size
        return next(i for i in range(size) if text[i] != ids[i])

    @torch.inference_mode()
    def copy(self, donor: int, slot: int, length: int) -> None:
        """Let a slot begin with the first tokens of another's text, and have its source."""
        self.texts[slot], self.sources[slot] = [], ()  # should copying fail
        self.cache.copy(donor, slot, length)
        self.texts[slot] = self.texts[donor][:length]
        self.sources[slot] = self.sources[donor]

    def borrow(self, slot: int, reading: Reading, donors: Iterable[int]) -> None:
        """Copy into a slot what saves a text most, unless what the slot holds saves as much."""
        donor = max(donors, key=lambda used: self.saved(used, reading), default=slot)
        if self.saved(donor, reading) > self.saved(slot, reading):
            self.copy(donor, slot, self.shared(donor, reading))

    @torch.inference_mode()
    def read(self, readings: dict[int, Reading]) -> tuple[Ahead, dict[int, range]]:
        """Continue the slots' texts, or begin others in them.

        Returns what may follow the last ids that were wanted, and which of its rows are each slot's.
        """
        self._remember_sources(readings)
        new: list[Sequence[int]] = [()] * len(self.texts)
        kept = list(self.cache.lengths)
        branches: dict[int, Branches] = {}
        for slot, reading in readings.items():
            if reading.branches is None:
                kept[slot] = self.shared(slot, reading)
                del self.texts[slot][kept[slot] :]
                new[slot] = reading.ids[kept[slot] :]
            else:
                kept[slot] = min(kept[slot], reading.branches.mask.shape[1])  # a tree can become narrower
                new[slot] = reading.ids
                branches[slot] = reading.branches
        self.cache.truncate(kept)
        batch = self._pack(new)
        wanted: list[int] = []
        places: dict[int, range] = {}
        end = 0
        for slot, ids in enumerate(new):
            end += len(ids)
            if slot in readings:
                places[slot] = range(len(wanted), len(wanted) + readings[slot].wanted)
                wanted += range(end - readings[slot].wanted, end)
        hidden = self.model.next_hidden(batch, self.cache, wanted, branches)
        for slot in readings.keys() - branches.keys():
            self.texts[slot] += new[slot]
        return Ahead(self.model, hidden), places

    def _remember_sources(self, readings: dict[int, Reading]) -> None:
        """Encode the sources that are not those of their slots."""
        if not isinstance(self.model, Transformer):
            return
        assert self.cache.memory is not None
        other = {i: reading.source for i, reading in readings.items() if not self._same_source(i, reading)}
        if not other:
            return
        for slot in other:  # first: whatever is interrupted behind this is read again
            self.sources[slot], self.texts[slot] = (), []
        lengths = self.cache.memory.lengths
        self.cache.memory.truncate([0 if i in other else length for i, length in enumerate(lengths)])
        self.model.remember(self._pack([other.get(i, ()) for i in range(len(self.texts))]), self.cache)
        for slot, source in other.items():
            self.sources[slot] = source

    def _pack(self, sequences: list[Sequence[int]]) -> Ragged:
        ids = [id for sequence in sequences for id in sequence]
        self.computed += len(ids)
        layout = Layout(tuple(map(len, sequences)), self.cache.device)
        return Ragged(torch.tensor(ids, dtype=torch.long, device=self.cache.device), layout)
