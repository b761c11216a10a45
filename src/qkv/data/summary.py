"""What there is to know about data before a model learns from them: sizes, repetitions, leaks, balance."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qkv.data.dataset import Dataset
from qkv.data.raw import ImageFile, Raw, Samples

COMPARED_BYTES = 4 << 30
"""Images are compared with each other if their files have no more bytes than this together."""


class Spread(NamedTuple):
    """Of some counts, the smallest, the one in the middle, and the largest."""

    least: int
    median: int
    most: int

    @staticmethod
    def of(counts: Iterable[int]) -> Spread:
        """Of at least one count."""
        values = np.fromiter(counts, dtype=np.int64)
        return Spread(int(values.min()), int(np.median(values)), int(values.max()))


@dataclass(frozen=True)
class Split:
    """The samples to train on, or those held out."""

    samples: int
    tokens: int
    """Of all samples, as the model reads them."""
    lengths: Spread
    """Tokens of one sequence of a batch."""
    characters: tuple[Spread, ...]
    """Of one text, for each column of texts."""
    empty: int
    """Texts without any visible character."""
    repeated: int | None
    """Samples that occurred before among these, empty ones aside; None if they were not compared."""
    labels: tuple[int, ...]
    """Samples of each class."""
    notes: tuple[str, ...]
    """What was cut, left out or not understood."""


@dataclass(frozen=True)
class Summary:
    """Of all data of a run."""

    about: str
    """What was understood, in sentences."""
    labels: tuple[str, ...]
    train: Split
    valid: Split
    leaked: int | None
    """Held-out samples that are training samples too, empty ones aside; None if they were not compared."""
    example: str
    """One of these."""

    def text(self) -> str:
        """For the user: what was understood, and all that is odd, a line each."""
        return "\n".join([self.about, *self.remarks()])

    def remarks(self) -> Iterator[str]:
        """What the user should know, the worst first."""
        if self.leaked:
            yield (
                f"Warning: {self.leaked:,} of {self.valid.samples:,} held-out samples are training samples "
                f"too, so scores will be too good; for instance {self.example}."
            )
        if missing := [name for i, name in enumerate(self.labels) if not self.train.labels[i]]:
            more = f" or {len(missing) - 5:,} more" if len(missing) > 5 else ""
            yield f"Warning: no training sample is labelled {', '.join(map(repr, missing[:5]))}{more}."
        for name, split in (("training", self.train), ("held-out", self.valid)):
            if split.repeated is None:
                yield (
                    f"The {name} images were not compared with others: they have more than "
                    f"{COMPARED_BYTES >> 30} GiB."
                )
            elif split.repeated:
                yield f"{split.repeated:,} of {split.samples:,} {name} samples are repetitions."
            if split.empty:
                yield f"{split.empty:,} {name} texts are empty."
            yield from (f"{name.capitalize()} data: {note}" for note in split.notes)
        if self.labels:
            most = max(range(len(self.labels)), key=lambda i: self.train.labels[i])
            share = 100 * self.valid.labels[most] / self.valid.samples
            yield f"Always saying {self.labels[most]!r} is right for {share:.1f} % of the held-out samples."


_EMPTY: Hashable = None
"""Stands for a sample without content."""


def summarize(raw: Raw, train: Dataset, valid: Dataset) -> Summary:
    """Look through all samples once; raw: what the datasets were made of. Takes seconds for a million."""
    train_keys, valid_keys = _keys(raw.train), _keys(raw.valid)
    leaks: list[int] | None = None
    if train_keys is not None and valid_keys is not None:
        known = set(train_keys) - {_EMPTY}
        leaks = [i for i, key in enumerate(valid_keys) if key in known]
    return Summary(
        about=raw.describe(),
        labels=raw.labels,
        train=_split(raw.train, train, train_keys, len(raw.labels)),
        valid=_split(raw.valid, valid, valid_keys, len(raw.labels)),
        leaked=None if leaks is None else len(leaks),
        example=_name(raw.valid, leaks[0]) if leaks else "",
    )


def _split(samples: Samples, dataset: Dataset, keys: list[Hashable] | None, classes: int) -> Split:
    columns = [column for column in (samples.texts, samples.pairs) if column]
    counts = Counter(samples.labels)
    present = None if keys is None else [key for key in keys if key != _EMPTY]
    return Split(
        samples=len(samples),
        tokens=int(dataset.costs.sum()),
        lengths=Spread.of(dataset.costs),
        characters=tuple(Spread.of(map(len, column)) for column in columns),
        empty=sum(not text.strip() for column in columns for text in column),
        repeated=None if present is None else len(present) - len(set(present)),
        labels=tuple(counts[i] for i in range(classes)),
        notes=dataset.notes,
    )


def _keys(samples: Samples) -> list[Hashable] | None:
    """What is equal for equal samples; None if it takes too long to tell."""
    if samples.images:
        return _image_keys(samples.images)
    if samples.pairs:
        both = zip(samples.texts, samples.pairs, strict=True)
        return [(text, pair) if text.strip() or pair.strip() else _EMPTY for text, pair in both]
    return [text if text.strip() else _EMPTY for text in samples.texts]


def _image_keys(images: Sequence[ImageFile]) -> list[Hashable] | None:
    """A hash of each file's bytes."""
    if sum(map(_size, images)) > COMPARED_BYTES:
        return None
    return [hashlib.blake2b(_content(image), digest_size=16).digest() for image in images]


def _size(image: ImageFile) -> int:
    return image.source.stat().st_size if isinstance(image.source, Path) else len(image.source)


def _content(image: ImageFile) -> bytes:
    return image.source.read_bytes() if isinstance(image.source, Path) else image.source


def _name(samples: Samples, index: int) -> str:
    """A sample in a few words."""
    if samples.images:
        return samples.images[index].name
    text = " ".join(samples.texts[index].split())
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
