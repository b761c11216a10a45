"""What all datasets share: samples by index, batches that are a pure function of seed, epoch and indices.

Legend: T tokens.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import chain

import numpy as np
import tokenizers
import torch
from torch import Tensor

from qkv.data.batches import Batch
from qkv.data.cache import Cache, Chunks, Columns, fingerprint
from qkv.data.files import TextFile
from qkv.errors import InputError
from qkv.ragged import Layout, Ragged
from qkv.tokenizers import ROLES, Tokenizer

Ids = np.ndarray[tuple[int], np.dtype[np.int64]]

TOKENIZERS = f"tokenizers {tokenizers.__version__}"
"""What turns texts into ids."""


class Dataset(ABC):
    """Samples by index.

    What is random about a sample is a function of (seed, epoch, index): never of the rest of its batch.
    """

    costs: Ids
    """Tokens of each sample; where they differ from epoch to epoch, about as many as it has in the mean."""
    fingerprint: str
    """A hash of the samples' content and of what turns it into ids or pixels: other data have another."""
    notes: tuple[str, ...] = ()
    """Sentences for the user about what was cut, left out or not understood."""
    size_in_bytes: int = 0
    """UTF-8 bytes of the text that a language model is scored on."""

    def __len__(self) -> int:
        return len(self.costs)

    @property
    def lengths(self) -> Ids:
        """Tokens of each sample or, where samples are groups of texts, of each text."""
        return self.costs

    @property
    def groups(self) -> Ids:
        """A number for each sample: a batch holds samples of one number only. Usually there is but one."""
        return np.zeros(len(self), dtype=np.int64)

    @abstractmethod
    def batch(self, indices: Sequence[int], epoch: int) -> Batch:
        """The samples `indices`, in that order, as they are in that epoch."""


class Sequences:
    """Many short integer sequences in one array, `values`, end to end."""

    def __init__(self, values: np.ndarray, lengths: np.ndarray) -> None:
        """values: all sequences end to end, of any integer type. lengths: of each."""
        self.lengths: Ids = lengths.astype(np.int64)
        self.values = values
        self._bounds = np.concatenate([[0], self.lengths.cumsum()])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Ids:
        return self.join(index, index + 1)

    def join(self, first: int, last: int) -> Ids:
        """The sequences from `first` up to but without `last`, end to end."""
        return self.values[self._bounds[first] : self._bounds[last]].astype(np.int64)

    def without_empty(self) -> Sequences:
        """Those that have any values."""
        return Sequences(self.values, self.lengths[self.lengths > 0])


def slices(length: int, size: int = 1024) -> Iterator[slice]:
    """Slices that cover a sequence, at least one: the tokenizers want many texts at a time, but not all."""
    return (slice(start, start + size) for start in range(0, max(length, 1), size))


def tokenise(tokenizer: Tokenizer, texts: Sequence[str], cache: Cache) -> tuple[Sequences, str]:
    """Each text's ids without special tokens, and a fingerprint of texts and tokenizer."""
    made_from = fingerprint("plain", tokenizer.definition, digest(texts)[0])
    return _each(texts, tokenizer.plain_batch, id_dtype(tokenizer), made_from, cache), made_from


def word_begins(tokenizer: Tokenizer, texts: Sequence[str], cache: Cache) -> Sequences:
    """For each id that `tokenise` gives, 1 if a word begins with it."""
    made_from = fingerprint("begins", tokenizer.definition, digest(texts)[0])
    return _each(texts, tokenizer.word_begins, np.uint8, made_from, cache)


def _each(
    texts: Sequence[str],
    values: Callable[[Sequence[str]], Sequence[Sequence[int]]],
    dtype: type[np.integer],
    made_from: str,
    cache: Cache,
) -> Sequences:
    """Values of each text's tokens."""

    def chunks() -> Chunks:
        for some in slices(len(texts)):
            found = values(texts[some])
            yield len(found), {"values": flat(found, dtype), "lengths": lengths_of(found)}

    found = cache.get(made_from, TOKENIZERS, chunks, "texts tokenised", len(texts))
    return Sequences(found["values"], found["lengths"])


@dataclass(frozen=True)
class Encoded:
    """Texts, or pairs of texts, in a tokenizer's template."""

    ids: Sequences
    segments: Sequences
    notes: tuple[str, ...]
    """About what was cut or not understood."""
    fingerprint: str
    """Of texts and tokenizer."""


def encode(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    pairs: Sequence[str],
    context: int,
    truncate: bool,
    cache: Cache,
) -> Encoded:
    """pairs: second texts, or none. Raises InputError for a text over the context that may not be cut."""

    def encoded(tokenizer: Tokenizer, some: slice) -> dict[str, np.ndarray]:
        encodings = tokenizer.encode_batch(texts[some], pairs[some] if pairs else None)
        segments = flat([e.segments for e in encodings], np.uint8)
        return {**in_template(tokenizer, [e.ids for e in encodings]), "segments": segments}

    content = digest(texts)[0] + digest(pairs)[0]
    arrays, notes = encode_within(tokenizer, texts, context, truncate, encoded, ("template", content), cache)
    lengths = arrays["lengths"]
    ids, segments = Sequences(arrays["ids"], lengths), Sequences(arrays["segments"], lengths)
    return Encoded(ids, segments, notes, fingerprint(tokenizer.definition, content))


def in_template(tokenizer: Tokenizer, ids: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """Some texts' ids and how many each has."""
    return {"ids": flat(ids, id_dtype(tokenizer)), "lengths": lengths_of(ids)}


def encode_within(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    context: int,
    truncate: bool,
    encoded: Callable[[Tokenizer, slice], dict[str, np.ndarray]],
    made_from: tuple[str, bytes],
    cache: Cache,
) -> tuple[Columns, tuple[str, ...]]:
    """What `encoded` makes of all texts, cut to the context if they may be, and notes about it.

    encoded: of some of the texts, ids and lengths among it. made_from: what tells its result from others.
    Raises InputError for a text over the context that may not be cut.
    """

    def found(tokenizer: Tokenizer) -> Columns:
        def chunks() -> Chunks:
            for some in slices(len(texts)):
                yield len(texts[some]), encoded(tokenizer, some)

        kind, content = made_from
        key = fingerprint(kind, tokenizer.definition, content)
        return cache.get(key, TOKENIZERS, chunks, "texts tokenised", len(texts))

    arrays = found(tokenizer)
    notes = check_context(arrays["lengths"], texts, context, truncate)
    if notes:
        arrays = found(tokenizer.shortened(context))
    return arrays, notes + check_vocabulary(arrays["ids"], tokenizer)


def id_dtype(tokenizer: Tokenizer) -> type[np.integer]:
    """The smallest type that all ids of the vocabulary fit in."""
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32


def flat(sequences: Sequence[Sequence[int]], dtype: type[np.integer]) -> np.ndarray:
    """Sequences end to end."""
    return np.fromiter(chain.from_iterable(sequences), dtype)


def lengths_of(sequences: Sequence[Sized]) -> np.ndarray:
    """The length of each sequence."""
    return np.fromiter(map(len, sequences), np.int32, len(sequences))


def digest(texts: Iterable[str | TextFile]) -> tuple[bytes, int]:
    """A hash of texts and of where each ends, and their size in UTF-8 bytes."""
    sha, ends, size = hashlib.sha256(), [], 0
    for text in texts:
        for part in [text] if isinstance(text, str) else text.parts():
            content = part.encode("utf-8", "surrogatepass")  # broken Unicode is for the tokenizer to refuse
            sha.update(content)
            size += len(content)
        ends.append(size)
    return sha.digest() + hashlib.sha256(np.array(ends, dtype="<i8").tobytes()).digest(), size


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
    short = min(first, second, budget // 2)
    return (short, budget - short) if first <= second else (budget - short, short)


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
        f"and begins {texts[i][:40]!r}: cut them with data.truncate (qkv eval: --truncate), or raise a new "
        "model's model.context"
    )


def check_vocabulary(ids: np.ndarray, tokenizer: Tokenizer) -> tuple[str, ...]:
    """A note about tokens that the vocabulary cannot say; scores count each as one token."""
    # GPT-2's end of text is also its unknown token, which nothing is to it.
    known = tokenizer.unk_id in (None, tokenizer.eos_id)
    count = 0 if known else int((ids == tokenizer.unk_id).sum())
    return (f"{count:,} of {len(ids):,} tokens are unknown to the tokenizer.",) if count else ()
