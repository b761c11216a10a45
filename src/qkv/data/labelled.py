"""Texts, or pairs of texts, with what is to be said of each: a class, a set of labels, a value.

Legend: T tokens of the batch, N texts, K labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qkv.data.batches import LabelledBatch, TextBatch
from qkv.data.dataset import Dataset, Sequences, check_context, join, lay, slices
from qkv.ragged import Ragged
from qkv.tokenizers import Encoding, Tokenizer


class LabelledDataset(Dataset):
    """Texts in the tokenizer's template (Devlin et al. 2018, 4), and the answer to each."""

    def __init__(
        self,
        texts: Sequence[str],
        pairs: Sequence[str],
        answers: Sequence[int] | NDArray[Any],
        tokenizer: Tokenizer,
        context: int,
        truncate: bool,
        make: Callable[[Ragged, Tensor, Tensor], TextBatch] = LabelledBatch,
    ) -> None:
        """pairs: second texts, or none. answers: what `make` puts into a batch, (all, ...).

        Raises InputError for a text over the context that may not be cut.
        """
        encodings = _encode(tokenizer, texts, pairs)
        lengths = np.array([len(e.ids) for e in encodings])
        self.notes = check_context(lengths, texts, context, truncate)
        if self.notes:
            encodings = _encode(tokenizer.shortened(context), texts, pairs)
        self.ids = Sequences(e.ids for e in encodings)
        self.segments = Sequences(e.segments for e in encodings)
        self.answers = np.asarray(answers)  # (all, ...)
        self.make = make
        self.costs = self.ids.lengths

    def batch(self, indices: Sequence[int], epoch: int) -> TextBatch:
        """Texts as ids and segments (T,), and the answers (N, ...); the same in every epoch."""
        return self.make(
            lay([self.ids[i] for i in indices]),
            join([self.segments[i] for i in indices]),
            torch.from_numpy(self.answers[list(indices)]),
        )


def _encode(tokenizer: Tokenizer, texts: Sequence[str], pairs: Sequence[str]) -> list[Encoding]:
    """Each text, or each text and its pair, in the tokenizer's template."""
    return [
        encoding
        for some in slices(len(texts))
        for encoding in tokenizer.encode_batch(texts[some], pairs[some] if pairs else None)
    ]


def label_matrix(sets: Sequence[Sequence[int]], count: int) -> NDArray[np.bool_]:
    """Which of so many labels each sample has, (N, K)."""
    matrix = np.zeros((len(sets), count), dtype=bool)
    for row, labels in zip(matrix, sets, strict=True):
        row[list(labels)] = True
    return matrix
