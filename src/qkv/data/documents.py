"""Documents for BERT: pairs of segments with hidden words (Devlin et al. 2018, 3.1 and A.1).

Legend: T tokens of the batch, N pairs, M selected tokens, V vocabulary, L tokens of one pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from qkv.data.batches import MaskedBatch
from qkv.data.cache import NO_CACHE, Cache, fingerprint
from qkv.data.dataset import Dataset, Ids, check_vocabulary, fit, join, lay, special_ids, tokenise
from qkv.errors import InputError
from qkv.tokenizers import Tokenizer

SHORT = 0.1
"""Share of the pairs that aim at a random shorter length: texts of later tasks are short (A.2)."""
RANDOM_NEXT = 0.5
"""Share of the pairs whose B comes from another document."""
SELECTED = 0.15
"""Share of the tokens to predict."""
MASKED, RANDOM = 0.8, 0.1
"""Shares of these that become [MASK] and a random token. The rest stays."""


@dataclass(frozen=True)
class _Chunk:
    """Sentences of one document, from `first` up to, without, `last`, for a pair of up to `budget` tokens."""

    document: int
    first: int
    last: int
    budget: int


@dataclass(frozen=True)
class _Pair:
    ids: Ids  # (L,)
    segments: Ids  # (L,)
    selected: Ids  # (M,) places among the L tokens
    labels: Ids  # (M,)
    random: bool


class MaskedDataset(Dataset):
    """Masked words and next sentences.

    Documents are divided once into chunks of sentences that fill the context. Every epoch cuts each
    chunk at another sentence: A is what stands before the cut, B what follows it or, half the time,
    a passage of another document; and it selects and hides other tokens.
    """

    def __init__(
        self,
        documents: Sequence[str],
        tokenizer: Tokenizer,
        context: int,
        seed: int,
        cache: Cache = NO_CACHE,
        whole_words: bool = False,
        selected_share: float = SELECTED,
    ) -> None:
        """documents: one sentence a line. whole_words: select all tokens of a word or none.

        selected_share: of the tokens that there are to predict.

        Raises InputError if no pairs can be made of them, or if the tokens do not tell what a word is.
        """
        self.cls, self.sep, self.mask = _tokens(tokenizer)
        if context < 5:
            raise InputError(f"model.context is {context}; pairs of segments need at least 5 tokens")
        lines = [[line for line in document.split("\n") if line.strip()] for document in documents]
        ids, content = tokenise(tokenizer, [line for document in lines for line in document], cache)
        # Control characters alone make a line, but no token.
        owner = np.repeat(np.arange(len(lines)), [len(document) for document in lines])[ids.lengths > 0]
        counts = np.bincount(owner, minlength=len(lines))  # sentences of each document
        counts = counts[counts > 0]
        self.fingerprint = fingerprint("documents", content, counts.tobytes())
        self.sentences = ids.without_empty()
        self.bounds = np.concatenate([[0], counts.cumsum()])  # document d has sentences bounds[d:d+2]
        self.seed = seed
        self.selected_share = selected_share
        self.chunks = list(self._chunks(context - 3))
        if len(counts) < 2 or not self.chunks:
            raise InputError(
                f"next-sentence prediction needs at least 2 documents, a blank line between them and one "
                f"sentence a line; found {len(counts)} with {len(self.sentences):,} sentences"
            )
        alone = int((counts == 1).sum())
        if alone:
            self.notes = (f"{alone:,} documents of one sentence serve only as random second segments.",)
        self.notes += check_vocabulary(self.sentences.values, tokenizer)
        self.costs = np.array([chunk.budget + 3 for chunk in self.chunks])
        special = special_ids(tokenizer)
        self.is_text = np.ones(tokenizer.vocab_size, dtype=bool)  # (V,)
        self.is_text[special] = False
        if not self.is_text[self.sentences.values].any():
            raise InputError("the tokenizer knows no word of the documents: is it of another language?")
        self.words = self.is_text.nonzero()[0]
        self.continues: NDArray[np.bool_] | None = None  # (V,)
        if whole_words:
            self.continues = np.zeros(tokenizer.vocab_size, dtype=bool)
            self.continues[self.words] = [tokenizer.continues(id) for id in self.words.tolist()]

    def _chunks(self, room: int) -> Iterator[_Chunk]:
        """Two or more sentences each, until they fill the room or, for one in ten, a random part of it."""
        rng = np.random.default_rng(self.seed)
        lengths = self.sentences.lengths.tolist()

        def goal() -> int:
            return int(rng.integers(2, room + 1)) if rng.random() < SHORT else room

        for document, (begin, end) in enumerate(
            zip(self.bounds[:-1].tolist(), self.bounds[1:].tolist(), strict=True)
        ):
            first, total, aim = begin, 0, goal()
            for i in range(begin, end):
                total += lengths[i]
                left = end - i - 1
                # A last sentence alone would have no B, so it joins the chunk before it.
                if left == 0 or (total >= aim and i > first and left > 1):
                    if i > first:
                        yield _Chunk(document, first, i + 1, min(total, room))
                    first, total, aim = i + 1, 0, goal()

    def batch(self, indices: Sequence[int], epoch: int) -> MaskedBatch:
        """Pairs as ids and segments (T,), what was hidden in them (M,), and whether B is random (N,)."""
        pairs = [self._pair(i, np.random.default_rng((self.seed, epoch, i))) for i in indices]
        starts = np.cumsum([0, *(len(pair.ids) for pair in pairs)])
        return MaskedBatch(
            lay([pair.ids for pair in pairs]),
            join([pair.segments for pair in pairs]),
            join([start + pair.selected for start, pair in zip(starts[:-1], pairs, strict=True)]),
            join([pair.labels for pair in pairs]),
            torch.tensor([int(pair.random) for pair in pairs]),
        )

    def _pair(self, index: int, rng: np.random.Generator) -> _Pair:
        chunk = self.chunks[index]
        cut = int(rng.integers(chunk.first + 1, chunk.last))
        a = self.sentences.join(chunk.first, cut)
        random = bool(rng.random() < RANDOM_NEXT)
        b = (
            self._elsewhere(chunk, chunk.budget - len(a), rng)
            if random
            else self.sentences.join(cut, chunk.last)
        )
        keep_a, keep_b = fit(len(a), len(b), chunk.budget)
        a, b = _trim(a, keep_a, rng), _trim(b, keep_b, rng)
        ids = np.concatenate([[self.cls], a, [self.sep], b, [self.sep]])
        segments = np.repeat([0, 1], [len(a) + 2, len(b) + 1])
        selected, labels = self._hide(ids, rng)
        return _Pair(ids, segments, selected, labels, random)

    def _elsewhere(self, chunk: _Chunk, length: int, rng: np.random.Generator) -> Ids:
        """Sentences of another document, from a random one on, until they have that many tokens."""
        document = int(rng.integers(len(self.bounds) - 2))
        document += document >= chunk.document
        begin, end = int(self.bounds[document]), int(self.bounds[document + 1])
        first = int(rng.integers(begin, end))
        last = first + 1
        while last < end and self.sentences.lengths[first:last].sum() < length:
            last += 1
        return self.sentences.join(first, last)

    def _hide(self, ids: Ids, rng: np.random.Generator) -> tuple[Ids, Ids]:
        """Select tokens and replace most of them in place; their places (M,) and what they were (M,)."""
        selected = self._select(ids, rng)
        count = len(selected)
        labels = ids[selected]
        fate = rng.random(count)
        random = rng.choice(self.words, count)
        ids[selected] = np.where(fate < MASKED, self.mask, np.where(fate < MASKED + RANDOM, random, labels))
        return selected, labels

    def _select(self, ids: Ids, rng: np.random.Generator) -> Ids:
        """Places (M,) of the tokens to predict, in order."""
        places = self.is_text[ids].nonzero()[0]
        room = min(len(places), max(1, round(self.selected_share * len(places))))
        if self.continues is None:
            return np.sort(rng.choice(places, room, replace=False))
        # As in the authors' later code: words in random order, those that fit. (The first always does,
        # so that there is something to predict.)
        apart = np.diff(places, prepend=-2) > 1
        words = np.split(places, np.flatnonzero(apart | ~self.continues[ids[places]])[1:])
        selected: list[Ids] = []
        for i in rng.permutation(len(words)):
            if not selected or len(words[i]) <= room:
                selected.append(words[i])
                room -= len(words[i])
        return np.sort(np.concatenate(selected))


def _tokens(tokenizer: Tokenizer) -> tuple[int, int, int]:
    """Ids of [CLS], [SEP] and [MASK]."""
    cls, sep, mask = tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id
    if cls is None or sep is None or mask is None:
        raise InputError("this tokenizer lacks [CLS], [SEP] or [MASK]; pre-training BERT needs all three")
    return cls, sep, mask


def _trim(ids: Ids, length: int, rng: np.random.Generator) -> Ids:
    """Take tokens away at both ends, each from a random one, as the authors' code does."""
    excess = len(ids) - length
    front = int(rng.binomial(excess, 0.5))
    return ids[front : front + length]
