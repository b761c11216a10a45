"""Texts, or pairs of texts, with a class.

Legend: T tokens of the batch, N texts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from qkv.data.batches import LabelledBatch
from qkv.data.cache import NO_CACHE, Cache, Chunks, fingerprint
from qkv.data.dataset import (
    TOKENIZERS,
    Dataset,
    Sequences,
    check_context,
    check_vocabulary,
    digest,
    flat,
    id_dtype,
    join,
    lay,
    lengths_of,
    slices,
)
from qkv.tokenizers import Tokenizer


class LabelledDataset(Dataset):
    """Texts in the tokenizer's template (Devlin et al. 2018, 4), and the index of each one's class."""

    def __init__(
        self,
        texts: Sequence[str],
        pairs: Sequence[str],
        labels: Sequence[int],
        tokenizer: Tokenizer,
        context: int,
        truncate: bool,
        cache: Cache = NO_CACHE,
    ) -> None:
        """pairs: second texts, or none. Raises InputError for a text over the context that may not be cut."""
        self.labels = np.asarray(labels)
        content = digest(texts)[0] + digest(pairs)[0]
        self.fingerprint = fingerprint("labelled", tokenizer.definition, content, self.labels.tobytes())
        self.ids, self.segments = _encode(tokenizer, texts, pairs, content, cache)
        self.notes = check_context(self.ids.lengths, texts, context, truncate)
        if self.notes:
            self.ids, self.segments = _encode(tokenizer.shortened(context), texts, pairs, content, cache)
        self.notes += check_vocabulary(self.ids.values, tokenizer)
        self.costs = self.ids.lengths

    def batch(self, indices: Sequence[int], epoch: int) -> LabelledBatch:
        """Texts as ids and segments (T,), classes (N,); the same in every epoch."""
        return LabelledBatch(
            lay([self.ids[i] for i in indices]),
            join([self.segments[i] for i in indices]),
            torch.from_numpy(self.labels[list(indices)]),
        )


def _encode(
    tokenizer: Tokenizer, texts: Sequence[str], pairs: Sequence[str], content: bytes, cache: Cache
) -> tuple[Sequences, Sequences]:
    """Ids and segments of each text, or each text and its pair, in the tokenizer's template."""

    def chunks() -> Chunks:
        for some in slices(len(texts)):
            encodings = tokenizer.encode_batch(texts[some], pairs[some] if pairs else None)
            ids = [e.ids for e in encodings]
            segments = flat([e.segments for e in encodings], np.uint8)
            yield (
                len(ids),
                {"ids": flat(ids, id_dtype(tokenizer)), "segments": segments, "lengths": lengths_of(ids)},
            )

    made_from = fingerprint("template", tokenizer.definition, content)
    found = cache.get(made_from, TOKENIZERS, chunks, "texts tokenised", len(texts))
    lengths = found["lengths"]
    return Sequences(found["ids"], lengths), Sequences(found["segments"], lengths)
