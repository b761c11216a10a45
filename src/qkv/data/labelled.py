"""Texts, or pairs of texts, with a class.

Legend: T tokens of the batch, N texts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from qkv.data.batches import LabelledBatch
from qkv.data.dataset import Dataset, Sequences, check_context, check_vocabulary, join, lay, slices
from qkv.tokenizers import Encoding, Tokenizer


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
    ) -> None:
        """pairs: second texts, or none. Raises InputError for a text over the context that may not be cut."""
        encodings = _encode(tokenizer, texts, pairs)
        lengths = np.array([len(e.ids) for e in encodings])
        self.notes = check_context(lengths, texts, context, truncate)
        if self.notes:
            encodings = _encode(tokenizer.shortened(context), texts, pairs)
        self.ids = Sequences(e.ids for e in encodings)
        self.segments = Sequences(e.segments for e in encodings)
        self.notes += check_vocabulary(self.ids.values, tokenizer)
        self.labels = np.asarray(labels)
        self.costs = self.ids.lengths

    def batch(self, indices: Sequence[int], epoch: int) -> LabelledBatch:
        """Texts as ids and segments (T,), classes (N,); the same in every epoch."""
        return LabelledBatch(
            lay([self.ids[i] for i in indices]),
            join([self.segments[i] for i in indices]),
            torch.from_numpy(self.labels[list(indices)]),
        )


def _encode(tokenizer: Tokenizer, texts: Sequence[str], pairs: Sequence[str]) -> list[Encoding]:
    """Each text, or each text and its pair, in the tokenizer's template."""
    return [
        encoding
        for some in slices(len(texts))
        for encoding in tokenizer.encode_batch(texts[some], pairs[some] if pairs else None)
    ]
