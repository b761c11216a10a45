"""Sentences whose words have tags.

Legend: T tokens of the batch, N sentences, M words of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np

from qkv.data.batches import TaggedBatch
from qkv.data.cache import NO_CACHE, Cache, fingerprint
from qkv.data.dataset import (
    Dataset,
    Ids,
    Sequences,
    digest,
    encode_within,
    flat,
    in_template,
    join,
    lay,
    lengths_of,
)
from qkv.errors import InputError
from qkv.tokenizers import Tokenizer


class TaggedDataset(Dataset):
    """Sentences in the tokenizer's template; a word's first piece has its tag (Devlin et al. 2018, 5.3)."""

    def __init__(
        self,
        sentences: Sequence[Sequence[str]],
        tags: Sequence[Sequence[int]],
        tokenizer: Tokenizer,
        context: int,
        truncate: bool,
        cache: Cache = NO_CACHE,
    ) -> None:
        """tags: of each word. Raises InputError for a sentence over the context that may not be cut."""
        if len(tokenizer.word_spans("aa")) > 1:
            raise InputError("tagging needs words of several characters: set tokenizer.kind to wordpiece")
        counts = lengths_of(sentences)
        content = digest(word for words in sentences for word in words)[0] + counts.tobytes()
        of_words = np.fromiter(chain.from_iterable(tags), np.int64)  # the tag of each word
        self.fingerprint = fingerprint("tagged", tokenizer.definition, content, of_words.tobytes())

        def encoded(tokenizer: Tokenizer, some: slice) -> dict[str, np.ndarray]:
            encodings = tokenizer.encode_words(sentences[some])
            first = [[-1 if place is None else place for place in e.first] for e in encodings]
            return {**in_template(tokenizer, [e.ids for e in encodings]), "first": flat(first, np.int32)}

        texts = [" ".join(words) for words in sentences]
        made_from = ("words", content)
        arrays, self.notes = encode_within(tokenizer, texts, context, truncate, encoded, made_from, cache)
        self.ids = Sequences(arrays["ids"], arrays["lengths"])
        first = arrays["first"]  # the place of each word's first token, or -1
        read = first >= 0
        owner = np.repeat(np.arange(len(sentences)), counts)
        tagged = np.bincount(owner[read], minlength=len(sentences))  # words of each sentence
        self.first = Sequences(first[read], tagged)
        self.tags = Sequences(of_words[read], tagged)
        self.members = np.flatnonzero(tagged)
        """Sentences of which a word is read."""
        self.costs = self.ids.lengths[self.members]
        if not len(self.members):
            raise InputError("no word has a token: is this the tokenizer of another language?")
        if lost := int((~read).sum()):
            self.notes += (f"{lost:,} of {len(read):,} words are left out: no token of theirs is read.",)

    def batch(self, indices: Sequence[int], epoch: int) -> TaggedBatch:
        """Ids (T,), the rows of first pieces (M,) and the tags (M,); the same in every epoch."""
        members = self.members[list(indices)].tolist()
        ids = [self.ids[i] for i in members]
        starts = np.cumsum([0, *map(len, ids)])[:-1]
        first: list[Ids] = [start + self.first[i] for start, i in zip(starts, members, strict=True)]
        return TaggedBatch(lay(ids), join(first), lay([self.tags[i] for i in members]))
