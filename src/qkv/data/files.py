"""Files to texts, lines, tables and images, with an error that says where a file is broken."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkv.errors import InputError
from qkv.files import expanded

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
CONLL = ".conll"
"""A file of words with tags, one a line."""


def paths_of(location: str) -> list[str]:
    """The one path of a location, or the two that have a comma between them; names may hold commas too."""
    if expanded(location).exists():
        return [location]
    commas = [place for place, character in enumerate(location) if character == ","]
    pairs = [[location[:place].strip(), location[place + 1 :].strip()] for place in commas]
    there = (pair for pair in pairs if all(pair) and all(expanded(path).exists() for path in pair))
    return next(there, [part.strip() for part in location.split(",") if part.strip()])


def existing(location: str) -> Path:
    """A path that is there. Raises InputError if it is not."""
    path = expanded(location)
    if not path.exists():
        raise InputError(f"no such file or folder: {location}")
    return path


def read_text(path: Path) -> str:
    """A whole file, line ends as they are. Raises InputError if it is unreadable, empty, or not UTF-8."""
    data = read_bytes(path).removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error, line=1) from None
    if not text.strip():
        raise InputError(f"{path} is empty")
    return text


def read_bytes(path: Path) -> bytes:
    """A whole file. Raises InputError if it cannot be read."""
    with readable(path):
        return path.read_bytes()


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Around the use of a file: an InputError that names it if it cannot be read."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def _not_utf8(path: Path, error: UnicodeDecodeError, line: int) -> InputError:
    """line: in which the data begin that the error is about."""
    if error.object.startswith(b"\x1f\x8b"):
        return InputError(f"{path} is compressed: unpack it first, for example with gunzip")
    wide = error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    line += error.object.count(b"\n", 0, error.start)
    return InputError(
        f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} in line {line}; convert it, "
        f"for example with iconv -f {'utf-16' if wide else 'latin1'} -t utf-8"
    )


def read_lines(path: Path) -> list[str]:
    """The lines of a file, which only line feeds (or carriage return and line feed) end."""
    lines = read_text(path).split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def each_line(path: Path) -> Iterator[tuple[str, int]]:
    """Each line with its end, read when it is asked for, and the byte behind it.

    Raises InputError if the file is unreadable or not UTF-8.
    """
    end = 0
    with readable(path), path.open("rb") as file:
        for number, data in enumerate(file, start=1):
            end += len(data)
            try:
                yield data.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode("utf-8"), end
            except UnicodeDecodeError as error:
                raise _not_utf8(path, error, number) from None


def each_sentence(path: Path, lines: Iterable[str]) -> Iterator[list[list[str]]]:
    """Sentences of a CoNLL file: of each word the columns, a blank line between sentences.

    Raises InputError, naming the line, where the number of columns changes, or the first or last is empty.
    """
    rows: list[list[str]] = []
    columns = 0
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\n").removesuffix("\r")
        # Words may hold other white space than these two.
        found = re.split("\t" if "\t" in line else " +", line.strip(" \t"))
        if found == [""] or found[0] == "-DOCSTART-":
            if rows:
                yield rows
                rows = []
            continue
        columns = columns or len(found)
        if len(found) != columns:
            raise InputError(f"{path}: columns in line {number}: {len(found)}, in those before it: {columns}")
        if not found[0].strip() or not found[-1].strip():
            raise InputError(f"{path}: line {number} has an empty column: {line!r}")
        rows.append(found)
    if rows:
        yield rows


def read_conll(path: Path) -> tuple[list[list[str]], list[list[str]]]:
    """Sentences as words and their tags: the first and the last column.

    Raises InputError as `each_sentence` does, and where there are no tags.
    """
    sentences = list(each_sentence(path, read_lines(path)))
    if not sentences:
        raise InputError(f"{path} has no sentences")
    if len(sentences[0][0]) < 2:
        raise InputError(f"{path} has words, but no tags: {sentences[0][0][0]!r}")
    words = [[row[0] for row in rows] for rows in sentences]
    return words, [[row[-1] for row in rows] for rows in sentences]


# ---------------------------------------------------------------- texts too large for memory


_PART_BYTES = 1 << 20


@dataclass(frozen=True)
class TextFile:
    """A UTF-8 file's text, or some of it, that is read in parts; as a string it has a length and slices."""

    path: Path
    first: int
    """The byte at which the text begins."""
    last: int
    """The byte before which it ends."""
    characters: int

    @staticmethod
    def open(path: Path) -> TextFile:
        """A whole file. Raises InputError as `read_text` does."""
        with readable(path), path.open("rb") as file:
            size = path.stat().st_size
            first = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        characters, blank = 0, True
        for part in TextFile(path, first, size, 0).parts():
            characters += len(part)
            blank = blank and not part.strip()
        if blank:
            raise InputError(f"{path} is empty")
        return TextFile(path, first, size, characters)

    def __len__(self) -> int:
        return self.characters

    def __getitem__(self, part: slice) -> TextFile:
        """The characters of a slice, without a step."""
        first, last, _ = part.indices(self.characters)
        return TextFile(self.path, self._byte(first), self._byte(last), max(0, last - first))

    def _byte(self, character: int) -> int:
        """Where in the file a character begins."""
        byte = self.first
        for part in self.parts():
            if len(part) >= character:
                return byte + len(part[:character].encode())
            character -= len(part)
            byte += len(part.encode())
        return byte

    def parts(self) -> Iterator[str]:
        """The text in parts of about a million characters. Raises InputError if it can no longer be read."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        line, left = 1, self.last - self.first
        with readable(self.path), self.path.open("rb") as file:
            file.seek(self.first)
            while left:
                data = file.read(min(left, _PART_BYTES))
                left -= len(data)
                if not data:
                    raise InputError(f"{self.path} has become shorter while it was read")
                try:
                    text = decoder.decode(data, final=not left)
                except UnicodeDecodeError as error:
                    raise _not_utf8(self.path, error, line) from None
                line += data.count(b"\n")
                yield text


# ---------------------------------------------------------------- tables


def check_column(path: Path, present: Sequence[str], name: str, setting: str) -> None:
    """Raise InputError if a file does not have a column once; setting: the one that names it."""
    if (count := present.count(name)) > 1:
        raise InputError(f"{path} has {count} columns {name!r}; rename all but one")
    if not count:
        raise InputError(
            f"{path} has no column {name!r}; it has {', '.join(present)}: name the right one with {setting}"
        )


@dataclass(frozen=True)
class Table:
    """Columns by name, those that were asked for and are there."""

    path: Path
    present: tuple[str, ...]
    """Names of all columns of the file."""
    columns: dict[str, list[Any]]
    class_names: dict[str, tuple[str, ...]]
    """What the numbers of a column of classes mean, where the file says so."""

    def texts(self, name: str, setting: str) -> list[str]:
        """A column of texts; setting: the one that names it."""
        values = self.values(name, setting)
        for row, value in enumerate(values, start=1):
            if not isinstance(value, str):
                raise InputError(f"{self.path}: row {row} of column {name!r} holds {value!r}, not text")
        return values

    def values(self, name: str, setting: str) -> list[Any]:
        """A column without gaps. Raises InputError if it is not there or a value is missing."""
        check_column(self.path, self.present, name, setting)
        values = self.columns[name]
        if not values:
            raise InputError(f"{self.path} has no rows")
        for row, value in enumerate(values, start=1):
            if value is None:
                raise InputError(f"{self.path}: row {row} has no value in column {name!r}")
            if isinstance(value, str):
                check_unicode(value, f"{self.path}: row {row} of column {name!r}")
        return values


def read_table(path: Path, wanted: Sequence[str]) -> Table:
    """The wanted columns of a CSV, TSV, JSON Lines or Parquet file. Raises InputError if it is not one."""
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_json_lines, ".parquet": _read_parquet}
    return readers[path.suffix.lower()](path, wanted)


def _read_csv(path: Path, wanted: Sequence[str]) -> Table:
    """Values stay text."""
    text = read_text(path)
    header, *rows = each_csv_row(path, io.StringIO(text, newline=""), len(text))
    places = {name: header.index(name) for name in wanted if header.count(name) == 1}
    columns = {name: [row[place] for row in rows] for name, place in places.items()}
    return Table(path, tuple(header), columns, {})


def each_csv_row(path: Path, lines: Iterable[str], longest: int) -> Iterator[list[str]]:
    """CSV as in RFC 4180; TSV, as its media type defines it, knows no quotes.

    path: by its ending the file is one or the other; lines: of it, with their ends; longest: no value has
    more characters. Raises InputError, naming the line, where it is neither.
    """
    tabs = path.suffix.lower() == ".tsv"
    usual_limit = csv.field_size_limit(longest)
    reader = csv.reader(
        lines,
        delimiter="\t" if tabs else ",",
        quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
        strict=True,
    )
    columns = 0
    try:
        for row in reader:
            if not row and (columns != 1 or not tabs):
                continue
            row = row or [""]  # without quotes, a lone empty value is a blank line
            columns = columns or len(row)
            if len(row) != columns:
                raise csv.Error(f"{len(row)} columns, not {columns}")
            yield row
    except csv.Error as error:
        raise InputError(f"{path} is not a table: line {reader.line_num}: {error}") from None
    finally:
        csv.field_size_limit(usual_limit)


def check_unicode(text: str, place: str) -> None:
    """Raise InputError for half a surrogate pair, which JSON can say."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{place} has half a surrogate pair: it is not Unicode") from None


def _read_json_lines(path: Path, wanted: Sequence[str]) -> Table:
    rows = list(each_json_row(path, read_lines(path)))
    present = tuple(dict.fromkeys(key for row in rows for key in row))
    columns = {name: [row.get(name) for row in rows] for name in wanted if name in present}
    return Table(path, present, columns, {})


def each_json_row(path: Path, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """One JSON object a line. Raises InputError, naming the file and the line, for another."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}: line {number} is not a JSON object with column names as keys")
        yield row


def _read_parquet(path: Path, wanted: Sequence[str]) -> Table:
    """Parquet; class names are where Hugging Face's datasets library puts them."""
    file = parquet_file(path)
    schema = file.schema_arrow
    with parquet_errors(path):
        table = file.read([name for name in wanted if schema.names.count(name) == 1], use_threads=False)
        columns = {name: table[name].to_pylist() for name in table.column_names}
    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = about.get("info", {}).get("features", {})
    elements = {name: _element(feature) for name, feature in features.items()}
    class_names = {name: tuple(f["names"]) for name, f in elements.items() if f.get("_type") == "ClassLabel"}
    return Table(path, tuple(schema.names), columns, class_names)


def _element(feature: Any) -> dict[str, Any]:
    """What datasets says of a column, or of the elements of its lists, in any notation that it has had."""
    inner = feature[:1] if isinstance(feature, list) else [feature.get("feature")]
    if inner and isinstance(inner[0], dict | list):
        return _element(inner[0])
    return feature if isinstance(feature, dict) else {}


def parquet_file(path: Path) -> Any:
    """A `pyarrow.parquet.ParquetFile`. Raises InputError if it is none."""
    from pyarrow import parquet

    with parquet_errors(path):
        return parquet.ParquetFile(path)


@contextmanager
def parquet_errors(path: Path) -> Iterator[None]:
    """Around the use of a Parquet file: whatever is wrong with it is an InputError that names it."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a Parquet file that can be read: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
