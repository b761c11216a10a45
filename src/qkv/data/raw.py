"""From the user's files to samples: what they hold, how they are split, which labels there are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from PIL import Image
from torch import Tensor

from qkv.config import BertHead, DataConfig, Family, Task
from qkv.data.files import (
    CONLL,
    TABLES,
    TextFile,
    existing,
    paths_of,
    read_bytes,
    read_conll,
    read_lines,
    read_table,
    read_text,
    readable,
)
from qkv.data.labels import (
    divide,
    guess_task,
    index,
    read_class_sets,
    read_classes,
    read_numbers,
    read_tagged,
)
from qkv.data.text import pieces
from qkv.errors import InputError
from qkv.files import visible
from qkv.images import ImageProcessor, Region, readable_image

Kind = Literal["text", "pairs", "images"] | Task
"""Running text, sources with targets, labelled images, or what one of BERT's tasks needs."""

PAIRABLE: tuple[Kind, ...] = ("classification", "multi_label", "regression", "contrastive")
"""Kinds whose texts may have second ones."""

AnyText = TypeVar("AnyText", str, TextFile)

IN_MEMORY_BYTES = 256 << 20
"""A GPT's text files stay on disk if they have more than this together; other text is held in memory."""

SPLIT_SEED = 0
"""Held-out samples do not depend on the run's seed, so that runs with different seeds compare."""


def bert_head(kind: Kind) -> BertHead:
    """The head that BERT needs to learn from such samples; contrastive learning needs none."""
    match kind:
        case "classification" | "multi_label" | "regression" | "tagging":
            return kind
        case "contrastive":
            return "none"
        case _:
            return "pretraining"


@dataclass(frozen=True)
class ImageFile:
    """An image not yet decoded, and what errors call it."""

    name: str
    source: Path | bytes

    def pixels(self, processor: ImageProcessor, region: Region | None = None) -> Tensor:
        """uint8 (C, S, S), of a region only if there is one. Raises InputError, naming a broken image."""
        try:
            return processor.pixels(self.source, region)
        except InputError as error:
            message = str(error)
            raise InputError(message if self.name in message else f"{self.name}: {message}") from None

    def content(self) -> bytes:
        """The file's bytes. Raises InputError if there is no such file."""
        return self.source if isinstance(self.source, bytes) else read_bytes(self.source)

    def size(self) -> int:
        """How many bytes the file has. Raises InputError if there is no such file."""
        if isinstance(self.source, bytes):
            return len(self.source)
        with readable(self.source):
            return self.source.stat().st_size

    def shape(self) -> tuple[int, int]:
        """Shorter side and number of channels (1 or 3), by the file's header."""
        file = BytesIO(self.source) if isinstance(self.source, bytes) else self.source
        with readable_image(self.name), Image.open(file) as image:
            return min(image.size), 1 if image.mode in ("1", "L", "LA") else 3


@dataclass(frozen=True)
class Samples:
    """Columns of equal length; those that a kind of data does not have are empty."""

    kind: Kind
    texts: list[str] = field(default_factory=list)
    """Documents, texts with labels, or sources."""
    pairs: list[str] = field(default_factory=list)
    """Second texts, or targets."""
    images: list[ImageFile] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    """Index of each sample's class among the labels."""
    label_sets: list[tuple[int, ...]] = field(default_factory=list)
    """Indices of each sample's labels, of which there may be none."""
    values: list[float] = field(default_factory=list)
    """What regression is to find."""
    words: list[list[str]] = field(default_factory=list)
    """Sentences to tag."""
    tags: list[list[int]] = field(default_factory=list)
    """Index of each word's tag among the labels."""
    files: list[TextFile] = field(default_factory=list)
    """Documents that are too large for memory, in place of texts."""

    def __len__(self) -> int:
        return max(len(self.texts), len(self.images), len(self.words), len(self.files))

    @property
    def task(self) -> Literal["auto", Task]:
        """The value of data.task that reads such samples."""
        match self.kind:
            case "text" | "pairs" | "images":
                return "auto"
            case task:
                return task

    @property
    def documents(self) -> list[str] | list[TextFile]:
        """Running text, wherever it is."""
        return self.files or self.texts

    @property
    def columns(self) -> tuple[list[str] | list[TextFile], ...]:
        """All text, in columns that may be empty; sentences to tag with blanks between their words."""
        return self.documents, self.pairs, [" ".join(words) for words in self.words]

    def take(self, indices: Sequence[int]) -> Samples:
        """Some of the samples."""
        columns = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "kind"}
        some: dict[str, Any] = {name: [c[i] for i in indices] for name, c in columns.items() if c}
        return replace(self, **some)

    def label_counts(self) -> Counter[int]:
        """How often each label, by its index, occurs."""
        several = (*self.label_sets, *self.tags)
        return Counter(self.labels) + Counter(label for labels in several for label in labels)

    def spread(self, count: int) -> Samples:
        """At most so many of the samples, evenly from the first to the last."""
        return self.take(np.unique(np.linspace(0, len(self) - 1, count).astype(int)).tolist())


@dataclass(frozen=True)
class Raw:
    """Samples to train on and to be scored on, as the files have them."""

    train: Samples
    valid: Samples
    labels: tuple[str, ...]
    """Names of the classes; none if the samples have no labels."""
    split: str
    """Where the held-out samples are from."""

    @property
    def kind(self) -> Kind:
        """What the samples are."""
        return self.train.kind

    @property
    def reads_pairs(self) -> bool:
        """Whether BERT reads two texts at once."""
        return self.kind == "text" or (self.kind != "contrastive" and bool(self.train.pairs))

    @cached_property
    def image_size(self) -> int:
        """The most common shorter side of the training images; 0 if there are none."""
        return self._most_common(0)

    @cached_property
    def channels(self) -> int:
        """3 if most training images have colours, 1 if they are grey; 0 if there are none."""
        return self._most_common(1)

    def _most_common(self, part: int) -> int:
        counts = Counter(shape[part] for shape in self._shapes)
        return counts.most_common(1)[0][0] if counts else 0

    @cached_property
    def _shapes(self) -> list[tuple[int, int]]:
        """Those of about a thousand images, which is enough to tell what most are."""
        every = 1 + len(self.train.images) // 1000
        return [image.shape() for image in self.train.images[::every]]

    def texts(self) -> Iterator[str]:
        """The training text, for a tokenizer to learn from."""
        for column in self.train.columns:
            for text in column:
                yield from pieces(text)

    def describe(self) -> str:
        """What was understood of the data, for the user."""
        lines = [f"{self._count(self.train)} to train on, {self._count(self.valid)} held out ({self.split})."]
        if self.kind in get_args(Task):
            lines.append(self._describe_task())
        if self.kind == "images":
            colours = "grey" if self.channels == 1 else "RGB"
            lines.append(f"Most are {colours}, their shorter side {self.image_size} pixels.")
        if self.labels and self.kind != "regression":
            counts = self.train.label_counts()
            noun = "tag" if self.kind == "tagging" else "label"
            shown = [f"{name} ({counts[i]:,})" for i, name in enumerate(self.labels[:20])]
            more = f" and {len(self.labels) - 20} more" if len(self.labels) > 20 else ""
            lines.append(f"{_plural(len(self.labels), noun)}: {', '.join(shown)}{more}.")
        return " ".join(lines)

    def _count(self, samples: Samples) -> str:
        if self.kind == "text":
            characters = sum(map(len, samples.documents))
            return f"{characters:,} characters in {_plural(len(samples), 'document')}"
        nouns = {
            "classification": "labelled text",
            "tagging": "sentence",
            "pairs": "sentence pair",
            "images": "image",
        }
        return _plural(len(samples), nouns.get(self.kind, "text"))

    def _describe_task(self) -> str:
        """What BERT is to learn."""
        second = "Each has a second text." if self.train.pairs else "There is no second text."
        if self.kind == "multi_label":
            none = self.train.label_sets.count(())
            return f"{second} Multi-label: each has any number of labels, {none:,} of them none."
        if self.kind == "regression":
            values = self.train.values
            return (
                f"{second} Regression: each has a number, from {min(values):g} to {max(values):g}, "
                f"on average {sum(values) / len(values):g}."
            )
        if self.kind == "tagging":
            return f"Tagging: each of {sum(map(len, self.train.words)):,} words has a tag."
        if self.kind == "contrastive" and self.train.pairs:
            return "Contrastive: the second text of each is to be found among those of others."
        if self.kind == "contrastive":
            return (
                "Contrastive: there is no second text, so each is to be found under another dropout. "
                "Held-out texts have no dropout: their accuracy says nothing, their loss how far apart "
                "they are."
            )
        return second


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


# ---------------------------------------------------------------- reading


def read(data: DataConfig, family: Family) -> Raw:
    """What a family learns from at `data.path`, with held-out samples from `data.valid` or split off.

    Raises InputError for anything that is missing, broken or cannot be understood.
    """
    if not data.path:
        raise InputError("no data: name a file or folder with data.path")
    if family != "bert" and data.task != "auto":
        raise InputError(f"data.task is {data.task}, which is BERT's: leave it out for {family}")
    samples, labels = _read(data.path, data, family, ())
    _check_variety(samples, labels, data.path)
    if data.valid:
        valid = read_held_out(data.valid, replace(data, task=samples.task), family, labels)
        if valid.kind != samples.kind:
            raise InputError(f"{data.path} holds {samples.kind} data, but {data.valid} {valid.kind} data")
        if bool(valid.pairs) != bool(samples.pairs):
            some, none = (data.valid, data.path) if valid.pairs else (data.path, data.valid)
            raise InputError(
                f"{some} has second texts, but {none} has none: name their column data.text_pair"
            )
        return Raw(samples, valid, labels, f"all of {data.valid}")
    share = f"{100 * data.valid_fraction:g} %"
    if samples.kind == "text":
        train, valid = _cut(samples, family, 1 - data.valid_fraction)
        if not len(train) or not len(valid):
            raise InputError(
                f"{data.path} has too little text to hold out {share}: give more (blank lines separate "
                f"documents for BERT), or data.valid"
            )
        return Raw(train, valid, labels, f"the last {share}")
    held_out = max(1, round(len(samples) * data.valid_fraction))
    if held_out >= len(samples):
        raise InputError(f"{data.path} has {len(samples)} samples, too few to hold some out; give data.valid")
    order = np.random.default_rng(SPLIT_SEED).permutation(len(samples)).tolist()
    train_order, valid_order = sorted(order[held_out:]), sorted(order[:held_out])
    return Raw(samples.take(train_order), samples.take(valid_order), labels, f"a random {share}")


def _check_variety(samples: Samples, labels: tuple[str, ...], location: str) -> None:
    """Raise InputError for training samples of which nothing can be learnt: all have the same answer."""
    if samples.kind == "regression" and len(set(samples.values)) == 1:
        raise InputError(f"every sample of {location} has the value {samples.values[0]:g}")
    if samples.kind == "tagging" and len(labels) == 1:
        raise InputError(f"every word of {location} has the tag {labels[0]!r}; a tagger needs at least two")
    if samples.kind in ("classification", "images") and len(labels) == 1:
        raise InputError(
            f"every sample of {location} has the label {labels[0]!r}; a classifier needs at least two"
        )


def read_held_out(location: str, data: DataConfig, family: Family, labels: tuple[str, ...]) -> Samples:
    """All samples at a location. Raises InputError as `read` does, and for a label not among `labels`."""
    return _read(location, data, family, labels)[0]


def _read(
    location: str, data: DataConfig, family: Family, labels: tuple[str, ...]
) -> tuple[Samples, tuple[str, ...]]:
    """The samples of a location, and the labels: those given, or if there are none, those found."""
    if family == "vit":
        return _read_images(existing(location), data, labels)
    if family == "transformer":
        return _read_pairs(location, data), ()
    path = existing(location)
    if family == "bert" and (data.task != "auto" or path.suffix.lower() in (*TABLES, CONLL)):
        return _read_task(path, data, labels)
    if path.suffix.lower() not in TABLES:
        files = _text_files(path)
        if family == "gpt" and sum(file.stat().st_size for file in files) > IN_MEMORY_BYTES:
            return Samples("text", files=[TextFile.open(file) for file in files]), ()
        documents = [read_text(file) for file in files]
        return Samples("text", _divide_documents(documents) if family == "bert" else documents), ()
    return Samples("text", read_table(path, [data.text]).texts(data.text, "data.text")), ()


def _read_task(path: Path, data: DataConfig, labels: tuple[str, ...]) -> tuple[Samples, tuple[str, ...]]:
    """What BERT needs for data.task, or for the one that the data tell."""
    if path.suffix.lower() == CONLL and data.task in ("auto", "tagging"):
        words, tags = read_conll(path)
        flat, labels = index([tag for row in tags for tag in row], labels, path, "tag")
        return Samples("tagging", words=words, tags=divide(flat, map(len, words))), labels
    if path.suffix.lower() not in TABLES:
        if data.task == "contrastive":
            lines = [line for file in _text_files(path) for line in read_lines(file) if line.strip()]
            return Samples("contrastive", lines), ()
        formats = ", ".join((*TABLES, CONLL) if data.task == "tagging" else TABLES)
        raise InputError(f"data.task {data.task} needs a table ({formats}); {path} is none")
    second = [data.text_pair] if data.text_pair else []
    table = read_table(path, [data.text, *second, data.label, data.tokens, data.tags])
    task = guess_task(table, data) if data.task == "auto" else data.task
    if task == "tagging":
        words, indices, labels = read_tagged(table, data, labels)
        return Samples(task, words=words, tags=indices), labels
    texts = table.texts(data.text, "data.text")
    paired = second and (data.text_pair in table.present or data.text_pair != DataConfig.text_pair)
    pairs = table.texts(data.text_pair, "data.text_pair") if paired else []
    if task == "contrastive":
        return Samples(task, texts, pairs), ()
    if task == "regression":
        return Samples(task, texts, pairs, values=read_numbers(table, data)), (data.label,)
    if task == "multi_label":
        sets, labels = read_class_sets(table, data, labels)
        return Samples(task, texts, pairs, label_sets=sets), labels
    classes, labels = read_classes(table, data, labels)
    return Samples(task, texts, pairs, labels=classes), labels


def _text_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = [file for file in visible(path, "**/*") if file.suffix.lower() == ".txt"]
    if not files:
        raise InputError(f"folder {path} holds no .txt files")
    return files


def _divide_documents(texts: list[str]) -> list[str]:
    """Documents are separated by blank lines."""
    parts = (part.strip("\r\n") for text in texts for part in re.split(r"\n(?:[^\S\n]*\n)+", text))
    return [part for part in parts if part.strip()]


def _read_pairs(location: str, data: DataConfig) -> Samples:
    if Path(location).suffix.lower() in TABLES:
        table = read_table(existing(location), [data.source, data.target])
        sources, targets = table.texts(data.source, "data.source"), table.texts(data.target, "data.target")
        return Samples("pairs", sources, targets)
    names = paths_of(location)
    if len(names) != 2:
        raise InputError(
            f"{location} is neither two aligned files, given as source.en,target.de, nor a table "
            f"({', '.join(TABLES)}) with columns {data.source!r} and {data.target!r}"
        )
    source, target = (existing(name) for name in names)
    sources, targets = read_lines(source), read_lines(target)
    if len(sources) != len(targets):
        raise InputError(
            f"{source} has {len(sources):,} lines, but {target} {len(targets):,}; "
            f"line i of one must translate line i of the other"
        )
    return Samples("pairs", sources, targets)


def _read_images(path: Path, data: DataConfig, labels: tuple[str, ...]) -> tuple[Samples, tuple[str, ...]]:
    if path.is_dir():
        files = visible(path, "*/*")
        if not files or any(file.is_dir() for file in files):
            raise InputError(f"folder {path} must hold one folder a class with its images, as in cat/1.png")
        indices, labels = index([file.parent.name for file in files], labels, path)
        return Samples(
            "images", images=[ImageFile(str(file), file) for file in files], labels=indices
        ), labels
    if path.suffix.lower() != ".parquet":
        raise InputError(f"{path} is neither a folder of images, as in class/name.png, nor a .parquet file")
    table = read_table(path, [data.image, data.label])
    images = []
    for row, value in enumerate(table.values(data.image, "data.image"), start=1):
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise InputError(f"{path}: row {row} of column {data.image!r} holds no image file's bytes")
        images.append(ImageFile(f"row {row} of {path}", content))
    indices, labels = read_classes(table, data, labels)
    return Samples("images", images=images, labels=indices), labels


# ---------------------------------------------------------------- splitting running text


def _cut(samples: Samples, family: Family, fraction: float) -> tuple[Samples, Samples]:
    """The first part of running text and the rest; for BERT, whole documents."""
    if samples.files:
        first, last = _cut_characters(samples.files, fraction)
        return Samples("text", files=first), Samples("text", files=last)
    cut = _cut_documents if family == "bert" else _cut_characters
    train, valid = cut(samples.texts, fraction)
    return Samples("text", train), Samples("text", valid)


def _cut_characters(documents: list[AnyText], fraction: float) -> tuple[list[AnyText], list[AnyText]]:
    """The first part of all characters, and the rest; one document may be cut in two."""
    left = int(sum(map(len, documents)) * fraction)
    for i, document in enumerate(documents):
        if len(document) > left:
            train, valid = documents[: i + 1], documents[i:]
            train[i], valid[0] = document[:left], document[left:]
            return [d for d in train if len(d)], valid
        left -= len(document)
    return documents, []


def _cut_documents(documents: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """The first documents and the rest, at least two: next-sentence prediction needs another document."""
    cut = max(0, min(int(len(documents) * fraction), len(documents) - 2))
    return documents[:cut], documents[cut:]
