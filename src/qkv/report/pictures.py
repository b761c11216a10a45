"""Pictures in a page: images, and attention weights. PNG as data URIs, SVG in place.

Legend: R rows and C columns of a picture.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from io import BytesIO

import numpy as np
from PIL import Image

from qkv.report.plot import axis

Matrix = np.ndarray[tuple[int, int], np.dtype[np.float32]]


def png(pixels: np.ndarray) -> str:
    """uint8 (R, C) or (R, C, 3) as a data URI."""
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def gallery(images: Iterable[tuple[np.ndarray, str, bool]]) -> str:
    """Images (uint8 pixels) with what a model says of each, and whether that is right."""
    items = []
    for pixels, text, right in images:
        mark = "" if right else ' class="wrong"'
        items.append(
            f'<figure{mark}><img src="{png(pixels)}" alt="image classified as {escape(text)}">'
            f"<figcaption>{escape(text)}</figcaption></figure>"
        )
    return f'<div class="gallery">{"".join(items)}</div>'


def overlay(pixels: np.ndarray, attention: Matrix, text: str) -> str:
    """An image, and beside it the attention (R, C) to its patches, darker for more."""
    R, C = attention.shape
    cells = _cells(attention / max(float(attention.max()), 1e-9), 1.0)
    return (
        f'<figure class="pair"><img src="{png(pixels)}" alt="{escape(text)}">'
        f'<svg viewBox="0 0 {C} {R}" role="img" aria-label="attention to {escape(text)}"><title>attention to '
        f'{escape(text)}</title><rect class="ground" width="{C}" height="{R}"/>{cells}</svg>'
        f"<figcaption>{escape(text)}</figcaption></figure>"
    )


_CELL, _LETTER = 14.0, 6.4


def heatmap(
    rows: Sequence[str], columns: Sequence[str], weights: Matrix, row_name: str, column_name: str
) -> str:
    """Attention weights (R, C) between labelled tokens; darker is more."""
    R, C = weights.shape
    left = 26 + _LETTER * max(map(len, rows))
    top = 26 + _LETTER * max(map(len, columns))
    width, height = left + C * _CELL + 4, top + R * _CELL + 4
    names = "".join(
        f'<text class="token" x="{left - 5:.1f}" y="{top + (i + 0.72) * _CELL:.1f}" text-anchor="end">'
        f"{escape(name)}</text>"
        for i, name in enumerate(rows)
    ) + "".join(
        f'<text class="token" transform="translate({left + (j + 0.72) * _CELL:.1f} {top - 5:.1f}) '
        'rotate(-90)">'
        f"{escape(name)}</text>"
        for j, name in enumerate(columns)
    )
    about = f"attention from {row_name} (rows) to {column_name} (columns)"
    return (
        f'<div class="scroll"><svg class="map" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'style="min-width:{0.72 * width:.0f}px;max-width:{1.5 * width:.0f}px" aria-label="{escape(about)}">'
        f"<title>{escape(about)}</title>"
        f"{axis(left + C * _CELL / 2, 12, column_name)}"
        f"{axis(12, top + R * _CELL / 2, row_name, upward=True)}{names}"
        f'<g transform="translate({left:.1f} {top:.1f})">'
        f'<rect class="ground" width="{C * _CELL:.0f}" height="{R * _CELL:.0f}"/>'
        f"{_cells(weights, _CELL, rows, columns)}</g></svg></div>"
    )


def _cells(weights: Matrix, side: float, rows: Sequence[str] = (), columns: Sequence[str] = ()) -> str:
    """A square for every weight that can be seen; with labels, each says what it is."""
    cells = []
    for (i, j), weight in np.ndenumerate(weights):
        if weight >= 0.01:
            said = f"<title>{escape(rows[i])} → {escape(columns[j])}: {weight:.2f}</title>" if rows else ""
            cells.append(
                f'<rect class="cell" x="{j * side:g}" y="{i * side:g}" width="{side:g}" height="{side:g}" '
                f'fill-opacity="{weight:.2f}">{said}</rect>'
            )
    return "".join(cells)
