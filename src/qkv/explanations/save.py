"""Explanations in files: a page, a figure or all values, by the file's ending."""

from __future__ import annotations

import os
from pathlib import Path

from qkv.config import FigureOptions
from qkv.errors import InputError
from qkv.explanations.explanation import Explanation
from qkv.explanations.figures import figure
from qkv.explanations.page import compare_page, page
from qkv.explanations.plain import to_json
from qkv.files import replace_file

FIGURES = (".png", ".svg")
ENDINGS = (".html", *FIGURES, ".json")


def save(
    explanation: Explanation,
    path: str | Path,
    compare: Explanation | None = None,
    options: FigureOptions = FigureOptions(),  # noqa: B008 - frozen
) -> None:
    """Write a file, whole or not at all.

    .html is the page, with `compare` of both side by side; .json is all values; .png and .svg are the figure
    that the options name. Raises InputError for another ending, and for what the explanation does not have.
    """
    path = Path(path)
    check_path(path, comparing=compare is not None)
    match path.suffix:
        case ".html":
            content = (page(explanation) if compare is None else compare_page(explanation, compare)).encode()
        case ".json":
            content = to_json(explanation).encode()
        case ".svg":
            content = figure(explanation, options).svg().encode()
        case _:
            content = figure(explanation, options).png()
    replace_file(path, lambda temporary: temporary.write_bytes(content))


def check_path(path: Path, comparing: bool) -> None:
    """Raises InputError for a file that `save` would not write, or could not."""
    if path.suffix not in ENDINGS:
        raise InputError(f"explanations are saved as {', '.join(ENDINGS)}; {path} is not called so")
    if comparing and path.suffix != ".html":
        raise InputError(f"two explanations side by side are saved as .html; {path} is not called so")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise InputError(
            f"cannot write {path}: {'it is a folder' if path.is_dir() else f'{folder} forbids it'}"
        )
