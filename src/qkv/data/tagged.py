"""Sentences whose words have tags.

Legend: T tokens of the batch, N sentences, M words of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qkv.data.batches import TaggedBatch
from qkv.data.dataset import Dataset, Ids, Sequences, check_context, join, lay, slices
from qkv.errors import InputError
from qkv.tokenizers import Tokenizer, WordEncoding


class TaggedDataset(Dataset):
    """Sentences in the tokenizer's template; a word's first piece has its tag (Devlin et al. 2018, 5.3)."""

    def __init__(
        self,
        sentences: Sequence[Sequence[str]],
        tags: Sequence[Sequence[int]],
        tokenizer: Tokenizer,
        context: int,
        truncate: bool,
    ) -> None:
        """tags: of each word. Raises InputError for a sentence over the context that may not be cut."""
        if len(tokenizer.word_spans("aa")) > 1:
            raise InputError("tagging needs words of several characters: set tokenizer.kind to wordpiece")
        encodings = _encode(tokenizer, sentences)
        lengths = np.array([len(e.ids) for e in encodings])
        self.notes = check_context(lengths, [" ".join(words) for words in sentences], context, truncate)
        if self.notes:
            encodings = _encode(tokenizer.shortened(context), sentences)
        read = [
            [(place, tag) for place, tag in zip(e.first, row, strict=True) if place is not None]
            for e, row in zip(encodings, tags, strict=True)
        ]
        self.ids = Sequences(e.ids for e, row in zip(encodings, read, strict=True) if row)
        self.first = Sequences([place for place, _ in row] for row in read if row)
        self.tags = Sequences([tag for _, tag in row] for row in read if row)
        self.costs = self.ids.lengths
        words, tagged = sum(map(len, tags)), int(self.tags.lengths.sum())
        if not tagged:
            raise InputError("no word has a token: is this the tokenizer of another language?")
        if tagged < words:
            self.notes += (
                f"{words - tagged:,} of {words:,} words are left out: no token of theirs is read.",
            )

    def batch(self, indices: Sequence[int], epoch: int) -> TaggedBatch:
        """Ids (T,), the rows of first pieces (M,) and the tags (M,); the same in every epoch."""
        ids = [self.ids[i] for i in indices]
        starts = np.cumsum([0, *map(len, ids)])[:-1]
        first: list[Ids] = [start + self.first[i] for start, i in zip(starts, indices, strict=True)]
        return TaggedBatch(lay(ids), join(first), lay([self.tags[i] for i in indices]))


def _encode(tokenizer: Tokenizer, sentences: Sequence[Sequence[str]]) -> list[WordEncoding]:
    return [words for some in slices(len(sentences)) for words in tokenizer.encode_words(sentences[some])]
