"""An explanation in a few lines, for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from qkv.explanations.explanation import Choice, Explanation, Faithfulness, Relevance
from qkv.explanations.words import (
    METHODS,
    amount,
    asked,
    generates,
    leading,
    percent,
    read,
    visible,
)

_TOP = 3


def summary(explanation: Explanation) -> Iterator[Text | Table]:
    """What was answered and what it rests on: of one choice by every method, of several by one."""
    yield Text(asked(explanation))
    first, *more = explanation.choices
    if more:
        best = leading(first)
        method = METHODS[best.method].name.lower() if best else "not asked for"
        rows = [
            (
                _where(explanation, one),
                visible(one.answer),
                amount(one),
                _others(one),
                *_found(explanation, one, leading(one)),
            )
            for one in explanation.choices
        ]
        measure = "value" if first.outcome == "value" else "probability"
        yield _table(("of", "answer", measure, "instead", f"rests on ({method})", _HOLDS), rows)
    else:
        if others := _others(first):
            yield Text(f"{'Other labels' if first.outcome == 'label' else 'Instead'}: {others}")
        found = [(METHODS[one.method].name, *_found(explanation, first, one)) for one in first.relevances]
        part = "it rests on" if explanation.picture is None else "it rests on (row,column)"
        yield _table(("method", part, _HOLDS), found)
    if explanation.alignment is not None:
        yield Text(f"Alignment: {explanation.alignment.pharaoh}")


_HOLDS = "beats random orders?"
"""Whether a map holds up."""


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Table:
    """What has nothing in it is no column."""
    filled = [column for column in zip(header, *rows, strict=True) if any(column[1:])]
    table = Table(*(title for title, *_ in filled), box=SIMPLE_HEAD)
    for row in zip(*(cells for _, *cells in filled), strict=True):
        table.add_row(*map(Text, row))  # not markup: tokens may hold brackets
    return table


def _where(explanation: Explanation, choice: Choice) -> str:
    """Which token, or which of two texts, a choice is about; "" for one of a text that is written."""
    if generates(explanation):
        return ""
    (sequence,) = explanation.sequences
    if not sequence.special[choice.unit]:
        return visible(sequence.units[choice.unit])
    return ("first text", "second text")[sequence.segments[choice.unit]] if sequence.segments else ""


def _others(choice: Choice) -> str:
    """The likeliest other answers."""
    if choice.outcome == "value":
        return ""
    others = [guess for guess in choice.alternatives if guess.name != choice.answer]
    return " · ".join(f"{visible(name)} {percent(probability)}" for name, probability in others[:2])


def _found(explanation: Explanation, choice: Choice, relevance: Relevance | None) -> tuple[str, str]:
    """What was read that has the largest values, and whether the map holds up."""
    if relevance is None:
        return "", ""
    values = read(explanation, choice, relevance)
    if not values:
        return "nothing else was read", _holds(relevance.faithfulness)
    best = sorted(values, key=lambda pair: -pair[1])[:_TOP]
    listed = " · ".join(f"{visible(unit)} {value:.2g}" for unit, value in best if value > 0)
    return listed or "nothing", _holds(relevance.faithfulness)


def _holds(faithfulness: Faithfulness | None) -> str:
    if faithfulness is None:
        return "not measured"
    said, orders = faithfulness.beats_random, len(faithfulness.random_gains)
    return said if said in ("worse", "too few units") else f"{said}, {faithfulness.beaten} of {orders}"
