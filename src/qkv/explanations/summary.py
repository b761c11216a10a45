"""An explanation in a few lines, for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from qkv.explanations.explanation import Choice, Explanation, Relevance
from qkv.explanations.words import METHODS, amount, asked, is_value, leading, percent, read, visible

_TOP = 4


def summary(explanation: Explanation) -> Iterator[Text | Table]:
    """What was answered and what it rests on: of one choice by every method, of several by one."""
    yield Text(asked(explanation))
    first, *more = explanation.choices
    if more:
        best = leading(first)
        method = METHODS[best.method].name.lower() if best else "not asked for"
        rows = [
            (visible(one.answer), amount(one), _instead(one), *_found(explanation, one, leading(one)))
            for one in explanation.choices
        ]
        yield _table(("answer", "likelihood", "instead", f"rests on ({method})", "does that hold up?"), rows)
    else:
        if not is_value(first):
            yield Text(f"Instead: {_instead(first)}")
        found = [(METHODS[one.method].name, *_found(explanation, first, one)) for one in first.relevances]
        yield _table(("method", "it rests on", "does that hold up?"), found)
    if explanation.alignment is not None:
        yield Text(f"Alignment: {explanation.alignment.pharaoh}")


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Table:
    table = Table(*header, box=SIMPLE_HEAD)
    for row in rows:
        table.add_row(*map(Text, row))  # not markup: tokens may hold brackets
    return table


def _instead(choice: Choice) -> str:
    """The likeliest other answers."""
    others = [guess for guess in choice.alternatives if guess.name != choice.answer]
    return " · ".join(f"{visible(name)} {percent(probability)}" for name, probability in others[:2])


def _found(explanation: Explanation, choice: Choice, relevance: Relevance | None) -> tuple[str, str]:
    """What was read that has the largest values, and whether the map holds up."""
    if relevance is None:
        return "", ""
    values = [(unit, value) for unit, value in read(explanation, choice, relevance) if value > 0]
    best = sorted(values, key=lambda pair: -pair[1])[:_TOP]
    verdict = "not measured" if relevance.faithfulness is None else relevance.faithfulness.verdict
    return " · ".join(f"{visible(unit)} {value:.2g}" for unit, value in best) or "nothing", verdict
