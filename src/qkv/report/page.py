"""A page: cards, sections, figures, tables and text, as pure functions from values to HTML."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources


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
    """Held-out scores, a row a model or step; None where a measure makes no sense for it."""

    measures: tuple[Measure, ...]
    rows: dict[str, tuple[float | None, ...]]
    ours: frozenset[str]
    """Rows to point out: the models trained here among baselines, or the step that is kept."""
    rows_are: str = "Model"

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
    """A part of a page."""

    key: str
    """Its anchor."""
    title: str
    lead: str
    facts: dict[str, str]
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class Card:
    """One number at the top of a page, what it is, and the section that says more."""

    title: str
    value: str
    caption: str
    key: str


# ---------------------------------------------------------------- the page


def page(title: str, lead: str, cards: Iterable[Card], sections: Iterable[Section]) -> str:
    """A whole document in HTML."""
    body = (
        f"<header><h1>{escape(title)}</h1><p>{escape(lead)}</p>"
        f'<nav class="cards" aria-label="Overview">{"".join(map(_card, cards))}</nav></header>\n'
        f"<main>\n{''.join(map(_section, sections))}</main>\n"
    )
    return document(title, body, style())


def document(title: str, body: str, look: str, head: str = "") -> str:
    """A document of this body in HTML; look: its CSS; head: what stands before the title."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'{head}<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{look}</style>\n</head>\n<body>\n"
        f"{body}</body>\n</html>\n"
    )


def style() -> str:
    """The look that all pages share, as CSS."""
    return resources.files("qkv.report").joinpath("style.css").read_text(encoding="utf-8")


def _card(card: Card) -> str:
    return (
        f'<a class="card" href="#{card.key}"><b>{escape(card.title)}</b>'
        f'<span class="big">{escape(card.value)}</span><span>{escape(card.caption)}</span></a>'
    )


def _section(section: Section) -> str:
    lead = f'<p class="lead">{escape(section.lead)}</p>' if section.lead else ""
    facts = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in section.facts.items())
    facts = f"<dl>{facts}</dl>" if facts else ""
    return (
        f'<section id="{section.key}"><h2>{escape(section.title)}</h2>{lead}'
        f'{facts}<div class="figures">{"".join(map(_figure, section.figures))}</div></section>\n'
    )


def _figure(figure: Figure) -> str:
    caption = f"<p>{escape(figure.caption)}</p>" if figure.caption else ""
    wide = ' class="wide"' if figure.wide else ""
    return f"<article{wide}><h3>{escape(figure.title)}</h3>{figure.html}{caption}</article>"


# ---------------------------------------------------------------- tables and text


def framed(heads: Iterable[str], rows: Iterable[str], look: str = "") -> str:
    """A table of a header's cells and of rows, all HTML already, that scrolls. look: a class of the style."""
    header = "".join(f'<th scope="col">{head}</th>' for head in heads)
    named = f' class="{look}"' if look else ""
    return (
        f'<div class="scroll"><table{named}><thead><tr>{header}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def score_table(scores: Scores) -> str:
    """Scores with the best of each column in bold, and models apart from baselines."""
    heads = [escape(scores.rows_are)]
    for measure in scores.measures:
        better, arrow = ("lower", "↓") if measure.lower_is_better else ("higher", "↑")
        sign = f'<span class="arrow" title="{better} is better">{arrow}</span>'
        heads.append(f"{escape(measure.name)} {sign}")
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
    return framed(heads, rows, "scores")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts."""
    body = ("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return framed(map(escape, header), body)


def shares(header: Sequence[str], rows: Iterable[tuple[str, Sequence[float]]]) -> str:
    """A table of names with shares of a whole, as bars."""
    body = (
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(
            f'<td><div class="share"><span class="bar" style="width:{100 * value:.1f}%"></span>'
            f"<span>{100 * value:.1f} %</span></div></td>"
            for value in values
        )
        + "</tr>"
        for name, values in rows
    )
    return framed(map(escape, header), body, "shares")


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
        f'<ol class="guesses">{items}</ol></div>'
    )
