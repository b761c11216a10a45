"""A file of texts or images, row by row: it may be larger than memory."""

from __future__ import annotations

import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qkv.data.files import (
    check_column,
    check_unicode,
    each_csv_row,
    each_json_row,
    each_line,
    each_sentence,
    parquet_errors,
    parquet_file,
)
from qkv.errors import InputError
from qkv.files import visible


class Corpus:
    """The rows of a file, each the values of some columns. It can be gone through once.

    In a CSV, TSV, JSON Lines or Parquet file the columns are those of that name; any other file has one
    value a line. Raises InputError, naming the row or line, for what cannot be read.
    """

    def __init__(self, path: Path, columns: Sequence[str], perhaps: Sequence[str] = ()) -> None:
        """perhaps: more columns, taken if the file has them."""
        self.path = path
        self.columns = columns
        self.perhaps = perhaps
        self.read = 0
        """How much of the file was read: bytes, or rows of a Parquet file."""
        self.total = self._total()
        self.unit = "rows" if self._is_parquet else "bytes"

    @property
    def _is_parquet(self) -> bool:
        return self.path.suffix.lower() == ".parquet"

    def _total(self) -> int | None:
        """None for a pipe, of which nobody knows."""
        if self._is_parquet:
            return int(parquet_file(self.path).metadata.num_rows)
        try:
            about = self.path.stat()
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror}") from None
        return about.st_size if stat.S_ISREG(about.st_mode) else None

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        readers = {
            ".csv": self._csv,
            ".tsv": self._csv,
            ".jsonl": self._json_lines,
            ".parquet": self._parquet,
        }
        return readers.get(self.path.suffix.lower(), self._plain)()

    def name(self, number: int) -> str:
        """What errors call a row; the first one has the number 0."""
        return f"row {number + 1} of {self.path}"

    def _lines(self) -> Iterator[str]:
        for line, end in each_line(self.path):
            self.read = end
            yield line

    def _plain(self) -> Iterator[tuple[str]]:
        for line in self._lines():
            yield (line.removesuffix("\n").removesuffix("\r"),)

    def _csv(self) -> Iterator[tuple[Any, ...]]:
        rows = each_csv_row(self.path, self._lines(), self.total or sys.maxsize)
        header = next(rows, [])
        places = [header.index(name) for name in self._present(header)]
        for row in rows:
            yield tuple(row[place] for place in places)

    def _json_lines(self) -> Iterator[tuple[Any, ...]]:
        names: list[str] = []
        for number, row in enumerate(each_json_row(self.path, self._lines())):
            names = names or self._present(list(row))
            if late := [name for name in self.perhaps if name in row and name not in names]:
                raise InputError(f"{self.name(number)} has a column {late[0]!r}, which the first row has not")
            yield self._complete(number, names, [row.get(name) for name in names])

    def _parquet(self) -> Iterator[tuple[Any, ...]]:
        file = parquet_file(self.path)
        names = self._present(file.schema_arrow.names)
        batches = file.iter_batches(batch_size=256, columns=names, use_threads=False)
        while True:
            with parquet_errors(self.path):
                batch = next(batches, None)
                columns = [] if batch is None else [batch.column(name).to_pylist() for name in names]
            if batch is None:
                return
            for values in zip(*columns, strict=True):
                yield self._complete(self.read, names, values)
                self.read += 1

    def _present(self, header: Sequence[str]) -> list[str]:
        """The names of the columns to read. Raises InputError if one is not there, or is there twice."""
        names = [*self.columns, *(name for name in self.perhaps if name in header)]
        for name in names:
            check_column(self.path, header, name, "--column")
        return names

    def _complete(self, number: int, names: list[str], values: Sequence[Any]) -> tuple[Any, ...]:
        if None in values:
            missing = names[list(values).index(None)]
            raise InputError(f"{self.path}: row {number + 1} has no value in column {missing!r}")
        return tuple(values)

    def identity(self) -> str | None:
        """What is another if the file is; None for a pipe, which cannot be read again."""
        about = self.path.stat()
        if not stat.S_ISREG(about.st_mode):
            return None
        names = ",".join([*self.columns, *self.perhaps])
        return f"{self.path.resolve()} {about.st_size} {about.st_mtime_ns} {names}"


class TextCorpus(Corpus):
    """Rows of texts."""

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        for number, values in enumerate(super().__iter__()):
            for value in values:
                if not isinstance(value, str):
                    raise InputError(f"{self.name(number)} holds {value!r}, not text")
                check_unicode(value, self.name(number))
            yield values


class SentenceCorpus(Corpus):
    """Sentences of a CoNLL file, each as its words: the first column, a blank line between two sentences."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, [])

    def __iter__(self) -> Iterator[tuple[tuple[str, ...]]]:
        for rows in each_sentence(self.path, self._lines()):
            yield (tuple(row[0] for row in rows),)

    def name(self, number: int) -> str:
        """What errors call a sentence; the first one has the number 0."""
        return f"sentence {number + 1} of {self.path}"


class ImageCorpus(Corpus):
    """Rows of images: paths, or in a Parquet file what Hugging Face's datasets library keeps of an image."""

    def __iter__(self) -> Iterator[tuple[str | bytes]]:
        for number, (value,) in enumerate(super().__iter__()):
            content = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
            if not isinstance(content, str | bytes):
                raise InputError(f"{self.name(number)} holds neither an image file's path nor its bytes")
            yield (content,)


class ImageFolder:
    """The files of a folder and of the folders in it, in the order of their paths."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = [file for file in visible(path, "**/*") if file.is_file()]
        if not self.files:
            raise InputError(f"folder {path} holds no files")
        self.read = 0
        self.total = len(self.files)
        self.unit = "files"

    def __iter__(self) -> Iterator[tuple[Path]]:
        for file in self.files:
            yield (file,)
            self.read += 1

    def name(self, number: int) -> str:
        """What errors call a file; the first one has the number 0."""
        return str(self.files[number])

    def identity(self) -> str:
        """What is another if other files are there, or one of them has changed."""
        about = ((file.absolute(), file.stat()) for file in self.files)
        return "\n".join(f"{path} {known.st_size} {known.st_mtime_ns}" for path, known in about)
