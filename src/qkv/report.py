"""One offline HTML file about trained models: curves, scores, samples and attention pictures.

Everything here is a pure function from values to HTML text, and all text given is escaped. The page
has no script and loads nothing: pictures are inline SVG or data URIs.

Legend: R rows and C columns of a picture.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from io import BytesIO

import numpy as np
from PIL import Image

Matrix = np.ndarray[tuple[int, int], np.dtype[np.float32]]
Point = tuple[float, float]


@dataclass(frozen=True)
class Measure:
    """A column of a table of scores."""

    name: str
    digits: int = 2
    percent: bool = False
    lower_is_better: bool = False

    def show(self, value: float) -> str:
        """The value as text."""
        return f"{100 * value:.1f} %" if self.percent else f"{value:,.{self.digits}f}"


@dataclass(frozen=True)
class Scores:
    """Held-out scores, a row a model; None where a measure makes no sense for a model."""

    measures: tuple[Measure, ...]
    rows: dict[str, tuple[float | None, ...]]
    ours: frozenset[str]
    """Which of the rows are the models trained here; the others are baselines."""

    def best(self, column: int, names: Iterable[str]) -> float:
        """The best value that the named rows have in a column; NaN if none has one."""
        values = [v for name in names if (v := self.rows[name][column]) is not None]
        choose = min if self.measures[column].lower_is_better else max
        return choose(values, default=math.nan)

    def plain(self) -> dict[str, dict[str, float]]:
        """The values by row and measure."""
        return {
            name: {m.name: v for m, v in zip(self.measures, row, strict=True) if v is not None}
            for name, row in self.rows.items()
        }


@dataclass(frozen=True)
class Figure:
    """A part of a section: HTML, its heading, and a sentence below it in plain text."""

    title: str
    html: str
    caption: str = ""
    wide: bool = False
    """Over the page's whole width, not beside another one."""


@dataclass(frozen=True)
class Section:
    """What the page says about one model."""

    key: str
    """Its anchor and its name in lists."""
    title: str
    lead: str
    facts: dict[str, str]
    scores: Scores
    figures: tuple[Figure, ...]


# ---------------------------------------------------------------- the page


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """A whole document in HTML."""
    style = resources.files("qkv").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1><p>{escape(lead)}</p>"
        f"{_overview(sections)}</header>\n"
        f"<main>\n{''.join(map(_section, sections))}</main>\n</body>\n</html>\n"
    )


def _overview(sections: Sequence[Section]) -> str:
    """A card a model: its first measure beside the best baseline's."""
    cards = []
    for section in sections:
        scores = section.scores
        measure = scores.measures[0]
        own = scores.best(0, scores.ours)
        baseline = scores.best(0, scores.rows.keys() - scores.ours)
        cards.append(
            f'<a class="card" href="#{section.key}"><b>{escape(section.title.split(":")[0])}</b>'
            f'<span class="big">{measure.show(own)}</span>'
            f"<span>{escape(measure.name)}; best baseline {measure.show(baseline)}</span></a>"
        )
    return f'<nav class="cards" aria-label="Models">{"".join(cards)}</nav>'


def _section(section: Section) -> str:
    facts = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in section.facts.items())
    figures = (Figure("Held-out scores", score_table(section.scores)), *section.figures)
    return (
        f'<section id="{section.key}"><h2>{escape(section.title)}</h2>'
        f'<p class="lead">{escape(section.lead)}</p>'
        f'<dl>{facts}</dl><div class="figures">{"".join(map(_figure, figures))}</div></section>\n'
    )


def _figure(figure: Figure) -> str:
    caption = f"<p>{escape(figure.caption)}</p>" if figure.caption else ""
    wide = ' class="wide"' if figure.wide else ""
    return f"<article{wide}><h3>{escape(figure.title)}</h3>{figure.html}{caption}</article>"


# ---------------------------------------------------------------- tables and text


def score_table(scores: Scores) -> str:
    """Scores with the best of each column in bold, and models apart from baselines."""
    heads = "".join(
        f'<th scope="col">{escape(m.name)} <span class="arrow" title="{better} is better">{arrow}</span></th>'
        for m in scores.measures
        for better, arrow in [("lower", "↓") if m.lower_is_better else ("higher", "↑")]
    )
    rows = []
    for name, values in scores.rows.items():
        cells = []
        for column, (measure, value) in enumerate(zip(scores.measures, values, strict=True)):
            if value is None:
                cells.append("<td>–</td>")
                continue
            shown = measure.show(value)
            best = shown == measure.show(scores.best(column, scores.rows))
            cells.append(f"<td>{f'<b>{shown}</b>' if best else shown}</td>")
        mark = ' class="ours"' if name in scores.ours else ""
        rows.append(f'<tr{mark}><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="scroll"><table class="scores"><thead><tr><th scope="col">Model</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts."""
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def continuation(prompt: str, text: str) -> str:
    """A prompt and, marked, how a model goes on."""
    return f"<pre><code>{escape(prompt)}<mark>{escape(text)}</mark></code></pre>"


def filled(before: str, after: str, answers: Sequence[tuple[str, float]], truth: str) -> str:
    """A sentence with a gap, what was there, and a model's answers with their probabilities."""
    items = "".join(
        f'<li{" class=right" if word == truth else ""}><span class="bar" style="width:{100 * p:.1f}%"></span>'
        f"<span>{escape(word)}</span><span>{100 * p:.0f} %</span></li>"
        for word, p in answers
    )
    return (
        f'<div class="gap"><p>{escape(before)}<ins title="what the text says">{escape(truth)}</ins>'
        f"{escape(after)}</p>"
        f"<ol>{items}</ol></div>"
    )


# ---------------------------------------------------------------- pictures


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
        f"{_axis(left + C * _CELL / 2, 12, column_name)}"
        f"{_axis(12, top + R * _CELL / 2, row_name, upward=True)}{names}"
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


def curve(train: Sequence[Point], valid: Sequence[Point], unit: str) -> str:
    """Loss over optimiser steps, in training and on held-out data; axes with their names."""
    W, H, left, right, top, bottom = 460.0, 270.0, 48.0, 10.0, 30.0, 42.0
    xs = [x for x, _ in (*train, *valid)]
    smooth = _smooth([y for _, y in train])
    ys = [*smooth, *(y for _, y in valid)]
    x_ticks, y_ticks = _ticks(0.0, max(xs)), _ticks(min(ys), max(ys))
    low, high = min(*ys, y_ticks[0]), max(*ys, y_ticks[-1])

    def place(x: float, y: float) -> Point:
        across = left + (W - left - right) * x / max(max(xs), 1.0)
        return across, H - bottom - (H - top - bottom) * (min(y, high) - low) / max(high - low, 1e-9)

    def path(points: Iterable[Point], name: str) -> str:
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        return f'<polyline class="{name}" points="{corners}"/>'

    grid = []
    for y in y_ticks:
        _, v = place(0, y)
        grid.append(f'<line class="grid" x1="{left}" x2="{W - right}" y1="{v:.1f}" y2="{v:.1f}"/>')
        grid.append(f'<text x="{left - 8}" y="{v + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in x_ticks:
        u, _ = place(x, low)
        grid.append(f'<text x="{u:.1f}" y="{H - bottom + 18:.0f}" text-anchor="middle">{x:,g}</text>')
    dots = "".join(
        f'<circle class="valid" cx="{u:.1f}" cy="{v:.1f}" r="3.5">'
        f"<title>step {x:,.0f}: held-out loss {y:.3f}</title></circle>"
        for x, y in valid
        for u, v in [place(x, y)]
    )
    ends = [
        f"{name} {points[-1][1]:.2f}"
        for name, points in (("training", [(0.0, smooth[-1])]), ("held out", valid))
    ]
    about = f"learning curve: {' and '.join(ends)} {unit} at the end"
    key = (
        f'<g transform="translate({left} 14)"><line class="train" x2="18"/>'
        f'<text x="24" y="4">{ends[0]}</text>'
        f'<line class="valid" x1="130" x2="148"/><circle class="valid" cx="139" cy="0" r="3.5"/>'
        f'<text x="154" y="4">{ends[1]}</text></g>'
    )
    return (
        f'<svg class="curve" viewBox="0 0 {W:.0f} {H:.0f}" role="img" aria-label="{escape(about)}">'
        f"<title>{escape(about)}</title>{''.join(grid)}"
        f"{_axis((W + left) / 2, H - 6, 'optimiser step')}"
        f"{_axis(12, (H + top - bottom) / 2, f'loss ({unit})', upward=True)}"
        f"{path(train, 'noise')}{path(zip((x for x, _ in train), smooth, strict=True), 'train')}"
        f"{path(valid, 'valid')}{dots}{key}</svg>"
    )


def _axis(x: float, y: float, name: str, upward: bool = False) -> str:
    """The name of an axis around a point."""
    place = f"translate({x:.0f} {y:.0f}){' rotate(-90)' if upward else ''}"
    return f'<text class="axis" transform="{place}" text-anchor="middle">{escape(name)}</text>'


def _smooth(values: Sequence[float]) -> list[float]:
    """A moving average over about four values, without the bias of its first one."""
    total = weight = 0.0
    smooth = []
    for value in values:
        total, weight = 0.75 * total + 0.25 * value, 0.75 * weight + 0.25
        smooth.append(total / weight)
    return smooth


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers from at most `low` up to at most `high`."""
    span = max(high - low, 1e-9)
    power = 10.0 ** math.floor(math.log10(span))
    step = next(s * power for s in (0.1, 0.2, 0.5, 1.0, 2.0) if span / (s * power) <= 8)
    first = math.floor(low / step)
    return [round(i * step, 10) for i in range(first, math.floor(high / step) + 1)]
