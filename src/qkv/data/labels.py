"""What a column of labels says: a class, a set of classes, a number or a tag a word; and which of these.

Classes become indices among names: those known from training, or if there are none, those found.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import UnionType
from typing import Any

from qkv.config import DataConfig, Task
from qkv.data.files import Table, check_unicode
from qkv.errors import InputError

Names = tuple[str, ...]


def guess_task(table: Table, data: DataConfig) -> Task:
    """What a table is for: as its columns tell, and how its labels are written."""
    present = set(table.present)
    if data.tokens in present and data.text not in present:
        return "tagging"
    if data.label not in present:
        paired = data.text_pair in present - {""} and data.label == DataConfig.label
        return "contrastive" if paired else "classification"
    values = table.columns.get(data.label, [])
    if any(isinstance(value, list) for value in values):
        return "multi_label"
    numbers = [_number(value) for value in values]
    fractions = any(number is not None and not number.is_integer() for number in numbers)
    return "regression" if fractions and None not in numbers else "classification"


def read_classes(table: Table, data: DataConfig, known: Names) -> tuple[list[int], Names]:
    """The class of each row."""
    values = table.values(data.label, "data.label")
    for row, value in enumerate(values, start=1):
        if not isinstance(value, str | int) or value == "":
            hint = ": write whole numbers or text, or set data.task to regression"
            raise InputError(
                f"{table.path}: row {row} of column {data.label!r} holds {value!r}, not a class"
                f"{hint if isinstance(value, float) else ''}"
            )
    return _indices(values, table, data.label, known)


def read_class_sets(table: Table, data: DataConfig, known: Names) -> tuple[list[tuple[int, ...]], Names]:
    """The classes of each row: a list of them, or text with commas between them."""
    values = table.values(data.label, "data.label")
    rows = [re.split(r"\s*,\s*", v.strip()) if isinstance(v, str) else v for v in values]
    rows = [[] if row == [""] else row for row in rows]
    for number, (row, value) in enumerate(zip(rows, values, strict=True), start=1):
        if not _is_list(row, str | int):
            raise InputError(
                f"{table.path}: row {number} of column {data.label!r} holds {value!r}, not a list of labels"
            )
    if not known and not any(rows):
        raise InputError(f"no row of {table.path} has a label in column {data.label!r}")
    flat, names = _indices([one for row in rows for one in row], table, data.label, known)
    return [tuple(sorted(set(row))) for row in divide(flat, map(len, rows))], names


def read_numbers(table: Table, data: DataConfig) -> list[float]:
    """The number of each row."""
    numbers = []
    for row, value in enumerate(table.values(data.label, "data.label"), start=1):
        if (number := _number(value)) is None:
            raise InputError(
                f"{table.path}: row {row} of column {data.label!r} holds {value!r}, not a number"
            )
        numbers.append(number)
    return numbers


def read_tagged(
    table: Table, data: DataConfig, known: Names
) -> tuple[list[list[str]], list[list[int]], Names]:
    """The words of each row and their tags."""
    sentences = table.values(data.tokens, "data.tokens")
    tags = table.values(data.tags, "data.tags")
    for row, (words, theirs) in enumerate(zip(sentences, tags, strict=True), start=1):
        if not _is_list(words, str) or not words:
            raise InputError(f"{table.path}: row {row} of column {data.tokens!r} is not a list of words")
        check_unicode(" ".join(words), f"{table.path}: row {row} of column {data.tokens!r}")
        if not _is_list(theirs, str | int):
            raise InputError(f"{table.path}: row {row} of column {data.tags!r} is not a list of tags")
        if len(words) != len(theirs):
            raise InputError(f"{table.path}: row {row} has {len(words)} words, but {len(theirs)} tags")
    flat, names = _indices([tag for row in tags for tag in row], table, data.tags, known, "tag")
    return sentences, divide(flat, map(len, sentences)), names


def divide(values: Sequence[int], lengths: Iterable[int]) -> list[list[int]]:
    """Consecutive parts of these lengths."""
    rest = iter(values)
    return [[next(rest) for _ in range(length)] for length in lengths]


def index(found: list[str], known: Names, path: Path, noun: str = "label") -> tuple[list[int], Names]:
    """Each name's index among the known ones; with none known, among those found, numbers by size."""
    if not known:
        numbers = all(re.fullmatch(r"-?\d{1,18}", name) for name in found)
        known = tuple(sorted(set(found), key=lambda name: (int(name) if numbers else 0, name)))
    places = {name: i for i, name in enumerate(known)}
    if strange := sorted(set(found) - places.keys()):
        raise InputError(
            f"{path} has the {noun} {strange[0]!r}, which the training data lack: {', '.join(known[:20])}"
        )
    return [places[name] for name in found], known


def _indices(
    values: list[Any], table: Table, column: str, known: Names, noun: str = "label"
) -> tuple[list[int], Names]:
    """Values of a column as indices; numbers where the file names its classes are numbers of these."""
    names = table.class_names.get(column, ())
    if names and not all(isinstance(value, int) and 0 <= value < len(names) for value in values):
        raise InputError(f"{table.path}: column {column!r} has numbers outside its {len(names)} class names")
    found = [names[value] for value in values] if names else [str(value) for value in values]
    return index(found, known or names, table.path, noun)


def _is_list(value: Any, of: type | UnionType) -> bool:
    """Whether it is a list of such things, none of them an empty text."""
    return isinstance(value, list) and all(isinstance(one, of) and one != "" for one in value)


def _number(value: Any) -> float | None:
    """A finite number, also one written as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):  # no number, or a whole one that no float holds
        return None
    return number if math.isfinite(number) else None
