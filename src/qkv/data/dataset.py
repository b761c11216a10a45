"""What all datasets share: samples by index, batches that are a pure function of seed, epoch and indices.

Legend: T tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from qkv.data.batches import Batch
from qkv.errors import InputError
from qkv.ragged import Layout, Ragged
from qkv.tokenizers import ROLES, Tokenizer

Ids = np.ndarray[tuple[int], np.dtype[np.int64]]


class Dataset(ABC):
    """Samples by index.

    What is random about a sample is a function of (seed, epoch, index): never of the rest of its batch.
    """

    costs: Ids
    """Tokens of each sample; where they differ from epoch to epoch, the most there can be."""
    notes: tuple[str, ...] = ()
    """Sentences for the user about what was cut, left out or not understood."""
    size_in_bytes: int = 0
    """UTF-8 bytes of the text that a language model is scored on."""

    def __len__(self) -> int:
        return len(self.costs)

    @abstractmethod
    def batch(self, indices: Sequence[int], epoch: int) -> Batch:
        """The samples `indices`, in that order, as they are in that epoch."""


class Sequences:
    """Many short integer sequences in one array, `values`, end to end."""

    def __init__(self, sequences: Iterable[Sequence[int]]) -> None:
        arrays = [np.asarray(sequence, dtype=np.int32) for sequence in sequences]
        self.lengths: Ids = np.array([len(a) for a in arrays], dtype=np.int64)
        self.values = np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int32)
        self._bounds = np.concatenate([[0], self.lengths.cumsum()])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Ids:
        return self.join(index, index + 1)

    def join(self, first: int, last: int) -> Ids:
        """The sequences from `first` up to but without `last`, end to end."""
        return self.values[self._bounds[first] : self._bounds[last]].astype(np.int64)


def slices(length: int, size: int = 1024) -> Iterator[slice]:
    """Slices that cover a sequence: the tokenizers want many texts at a time, but not all."""
    return (slice(start, start + size) for start in range(0, length, size))


def tokenise(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[list[int]]:
    """Each text's ids without special tokens."""
    for some in slices(len(texts)):
        yield from tokenizer.plain_batch(texts[some])


def special_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids of all tokens that are not text, the unknown one included."""
    ids = (getattr(tokenizer, f"{role}_id") for role in ROLES)
    return sorted({id for id in ids if id is not None})


def lay(arrays: Sequence[Ids]) -> Ragged:
    """Sequences end to end, (T,)."""
    return Ragged(join(arrays), Layout(tuple(len(a) for a in arrays), torch.device("cpu")))


def join(arrays: Sequence[Ids]) -> Tensor:
    """Arrays end to end as one tensor."""
    return torch.from_numpy(np.concatenate(arrays))


def fit(first: int, second: int, budget: int) -> tuple[int, int]:
    """How many tokens two sequences keep to have at most `budget` together; the longer one gives way."""
    if first + second <= budget:
        return first, second
    if first <= second:
        first = min(first, budget // 2)
        return first, budget - first
    second = min(second, budget // 2)
    return budget - second, second


def check_context(lengths: Ids, texts: Sequence[str], context: int, truncate: bool) -> tuple[str, ...]:
    """Notes about texts over the context. Raises InputError for such texts unless they may be cut."""
    over = int((lengths > context).sum())
    if not over:
        return ()
    count = f"{over:,} of {len(lengths):,} texts"
    if truncate:
        return (f"{count} were longer than {context} tokens and were cut.",)
    i = int(lengths.argmax())
    raise InputError(
        f"{count} are longer than the model's context of {context} tokens; the longest has {lengths[i]:,} "
        f"and begins {texts[i][:40]!r}: raise model.context, or set data.truncate to cut them"
    )


def check_vocabulary(ids: np.ndarray, tokenizer: Tokenizer) -> tuple[str, ...]:
    """A note about tokens that the vocabulary cannot say; scores count each as one token."""
    count = 0 if tokenizer.unk_id is None else int((ids == tokenizer.unk_id).sum())
    return (f"{count:,} of {len(ids):,} tokens are unknown to the tokenizer.",) if count else ()
