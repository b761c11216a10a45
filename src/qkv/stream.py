"""Inputs through a pipeline and on to a file: with progress, bounded memory, and on from where it stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from qkv.console import CorpusBar
from qkv.errors import InputError
from qkv.output import Output
from qkv.pipelines import AnyPipeline, NumberedError

if TYPE_CHECKING:
    from rich.console import Console

    from qkv.data.corpus import Corpus, ImageFolder

Answer = TypeVar("Answer")


class Given:
    """Texts that are at hand."""

    unit = "texts"
    total = path = None

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = texts
        self.read = 0

    def __iter__(self) -> Iterator[tuple[str]]:
        for text in self.texts:
            yield (text,)
            self.read += 1

    def name(self, number: int) -> str:
        """What errors call a text; the first one has the number 0."""
        return f"text {number}"

    def identity(self) -> None:
        """They are there only once."""


Source: TypeAlias = "Given | Corpus | ImageFolder"
"""Where inputs come from."""


def answer_all(
    source: Source,
    ask: Callable[[Iterator[Any]], Iterator[Answer]],
    write: Callable[[Answer], object],
    output: Output | None,
    console: Callable[[], Console],
) -> None:
    """Ask for the answer to each input, and write it.

    output: what `write` writes to, if it is a file; answers that earlier work put there are not asked for.
    console: where to say how far it is.
    Raises InputError as source, pipeline and output do.
    """
    inputs = (parts[0] if len(parts) == 1 else parts for parts in source)
    first = output.done if output is not None else 0
    if first:
        console().print(f"Going on behind {first:,} answers.", highlight=False, markup=False)
    next(islice(inputs, first, first), None)  # goes past them
    answered = 0
    with CorpusBar(console, source.unit, source.total) as bar:
        try:
            for answer in ask(inputs):
                write(answer)
                answered += 1
                bar.update(source.read, answered)
        except NumberedError as error:
            raise InputError(f"{source.name(first + error.number)} {error.said}") from None


def work(pipeline: AnyPipeline, *settings: object) -> str:
    """A fingerprint of a checkpoint's files and settings: the same work gives the same answers."""
    checkpoint = pipeline.checkpoint
    about = (settings, pipeline.road, pipeline.model.config, checkpoint.pooling, checkpoint.images)
    sha = hashlib.sha256(repr(about).encode())
    if checkpoint.tokenizer is not None:
        sha.update(checkpoint.tokenizer.definition.encode())
    for path in checkpoint.files:
        with path.open("rb") as file:
            sha.update(hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()
