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
from qkv.data.cache import NO_CACHE, Cache, fingerprint
from qkv.data.dataset import Dataset, encode, join, lay
from qkv.ragged import Ragged
from qkv.tokenizers import Tokenizer


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
        cache: Cache = NO_CACHE,
    ) -> None:
        """pairs: second texts, or none. answers: what `make` puts into a batch, (all, ...).

        Raises InputError for a text over the context that may not be cut.
        """
        encoded = encode(tokenizer, texts, pairs, context, truncate, cache)
        self.ids, self.segments, self.notes = encoded.ids, encoded.segments, encoded.notes
        self.answers = np.asarray(answers)  # (all, ...)
        self.make = make
        answered = (self.answers.dtype.str, self.answers.tobytes())
        self.fingerprint = fingerprint("labelled", encoded.fingerprint, *answered)
        self.costs = self.ids.lengths

    def batch(self, indices: Sequence[int], epoch: int) -> TextBatch:
        """Texts as ids and segments (T,), and the answers (N, ...); the same in every epoch."""
        return self.make(
            lay([self.ids[i] for i in indices]),
            join([self.segments[i] for i in indices]),
            torch.from_numpy(self.answers[list(indices)]),
        )


def label_matrix(sets: Sequence[Sequence[int]], count: int) -> NDArray[np.bool_]:
    """Which of so many labels each sample has, (N, K)."""
    matrix = np.zeros((len(sets), count), dtype=bool)
    for row, labels in zip(matrix, sets, strict=True):
        row[list(labels)] = True
    return matrix
