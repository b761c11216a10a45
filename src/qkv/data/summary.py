"""What there is to know about data before a model learns from them: sizes, repetitions, leaks, balance."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
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
    labelled: int
    """Samples or, where words have tags, words."""
    labels: tuple[int, ...]
    """How many of these have each label."""
    notes: tuple[str, ...]
    """What was cut, left out or not understood."""


@dataclass(frozen=True)
class Summary:
    """Of all data of a run."""

    about: str
    """What was understood, in sentences."""
    labels: tuple[str, ...]
    """Names of the classes, labels or tags."""
    train: Split
    valid: Split
    leaked: int | None
    """Held-out samples that are training samples too, empty ones aside; None if they were not compared."""
    example: str
    """One of these."""
    baseline: str
    """A sentence about what a model scores that has learnt nothing; empty: there is no such model."""

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
                yield f"The {name} samples were not compared with others: there is too much of them."
            elif split.repeated:
                yield f"{split.repeated:,} of {split.samples:,} {name} samples are repetitions."
            if split.empty:
                yield f"{split.empty:,} {name} texts are empty."
            yield from (f"{name.capitalize()} data: {note}" for note in split.notes)
        if self.baseline:
            yield self.baseline


_EMPTY: Hashable = None
"""Stands for a sample without content."""


def summarize(raw: Raw, train: Dataset, valid: Dataset) -> Summary:
    """Look through all samples once; raw: what the datasets were made of. Takes seconds for a million."""
    train_keys, valid_keys = _keys(raw.train), _keys(raw.valid)
    leaks: list[int] | None = None
    if train_keys is not None and valid_keys is not None:
        known = set(train_keys) - {_EMPTY}
        leaks = [i for i, key in enumerate(valid_keys) if key in known]
    labels = () if raw.kind == "regression" else raw.labels
    splits = [
        _split(samples, dataset, keys, len(labels))
        for samples, dataset, keys in ((raw.train, train, train_keys), (raw.valid, valid, valid_keys))
    ]
    return Summary(
        about=raw.describe(),
        labels=labels,
        train=splits[0],
        valid=splits[1],
        leaked=None if leaks is None else len(leaks),
        example=_name(raw.valid, leaks[0]) if leaks else "",
        baseline=_baseline(raw, *splits),
    )


def _baseline(raw: Raw, train: Split, valid: Split) -> str:
    """What the most common answer of the training data, or their mean, is worth."""
    match raw.kind:
        case "classification" | "images" | "tagging":
            most = max(range(len(raw.labels)), key=lambda i: train.labels[i])
            share = 100 * valid.labels[most] / valid.labelled
            what = "words" if raw.kind == "tagging" else "samples"
            return f"Always saying {raw.labels[most]!r} is right for {share:.1f} % of the held-out {what}."
        case "multi_label":
            share = 100 * (1 - sum(valid.labels) / (valid.labelled * len(raw.labels)))
            return f"Never giving a label is right for {share:.1f} % of the held-out decisions."
        case "regression":
            mean = np.mean(raw.train.values)
            loss = np.mean((np.array(raw.valid.values) - mean) ** 2)
            return f"Always saying {mean:.4g} has the held-out loss {loss:.4g}."
        case _:
            return ""


def _split(samples: Samples, dataset: Dataset, keys: list[Hashable] | None, classes: int) -> Split:
    columns = [column for column in (_texts(samples), samples.pairs) if column]
    counts = samples.label_counts()
    present = None if keys is None else [key for key in keys if key != _EMPTY]
    return Split(
        samples=len(samples),
        tokens=int(dataset.lengths.sum()),
        lengths=Spread.of(dataset.lengths),
        characters=tuple(Spread.of(map(len, column)) for column in columns),
        empty=sum(not text.strip() for column in columns for text in column),
        repeated=None if present is None else len(present) - len(set(present)),
        labelled=sum(map(len, samples.tags)) or len(samples),
        labels=tuple(counts[i] for i in range(classes)),
        notes=dataset.notes,
    )


def _keys(samples: Samples) -> list[Hashable] | None:
    """What is equal for equal samples; None if it takes too long to tell."""
    if samples.files:
        return None
    if samples.images:
        return _image_keys(samples.images)
    if samples.pairs:
        both = zip(samples.texts, samples.pairs, strict=True)
        return [(text, pair) if text.strip() or pair.strip() else _EMPTY for text, pair in both]
    return [text if text.strip() else _EMPTY for text in _texts(samples)]


def _texts(samples: Samples) -> list[str]:
    """Those that samples have, or those that their words make."""
    return samples.texts or [" ".join(words) for words in samples.words]


def _image_keys(images: Sequence[ImageFile]) -> list[Hashable] | None:
    """A hash of each file's bytes."""
    if sum(image.size() for image in images) > COMPARED_BYTES:
        return None
    return [hashlib.blake2b(image.content(), digest_size=16).digest() for image in images]


def _name(samples: Samples, index: int) -> str:
    """A sample in a few words."""
    if samples.images:
        return samples.images[index].name
    text = " ".join(_texts(samples)[index].split())
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
