"""What page, terminal and figures say alike of an explanation, in words that need no background."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

from qkv.explanations.explanation import Choice, Explanation, Method, Relevance, Units


class Words(NamedTuple):
    """A method's name and, in a sentence, what its numbers mean."""

    name: str
    meaning: str


METHODS: dict[Method, Words] = {
    "attention": Words(
        "Attention",
        "How much the last layer looked at each part when it answered, as a mean over its heads.",
    ),
    "rollout": Words(
        "Rollout",
        "How much of each part can have flowed to the answer, following attention through all layers.",
    ),
    "flow": Words(
        "Flow",
        "How much of each part fits through the layers to the answer, if attention is how wide pipes are.",
    ),
    "relevance": Words(
        "Relevance",
        "How much each part carried towards this very answer: attention in all layers, where changing "
        "it would change the answer.",
    ),
    "gradient_x_input": Words(
        "Gradient x input",
        "How the answer would change if each part grew a little; below 0, a part speaks against it.",
    ),
    "integrated_gradients": Words(
        "Integrated gradients",
        "How much each part adds to the answer on the way from an empty input to this one; below 0, it "
        "speaks against it.",
    ),
    "occlusion": Words(
        "Occlusion",
        "By how much the answer's log-odds, or its value, fall when this part alone is blanked out; "
        "below 0, they rise.",
    ),
}


def answered(explanation: Explanation) -> str:
    """All that the model answered, as one text."""
    if not generates(explanation):
        answers = [choice.answer for choice in explanation.choices]
        return answers[0] if explanation.choices[0].outcome == "value" else ", ".join(answers)
    if explanation.target is not None:
        return explanation.target.strip()
    first, last = explanation.choices[0], explanation.choices[-1]
    sequence = next(one for one in explanation.sequences if one.name == first.sequence)
    markers = {
        unit
        for one in explanation.sequences
        for unit, special in zip(one.units, one.special, strict=True)
        if special
    }
    # All but the last token were read again, so that letters of several tokens are whole there.
    text = "".join(sequence.units[i] for i in _legible(sequence) if i > first.unit)
    return (text if last.answer in markers else text + last.answer).strip()


def read(explanation: Explanation, choice: Choice, relevance: Relevance) -> list[tuple[str, float]]:
    """What was read, each unit with its value.

    The model's markers and the unit that made the choice are left out: often their values are far above all
    others, which would look alike beside them.
    """
    return [
        (sequence.units[i], float(value))
        for sequence in explanation.sequences
        if sequence.name in relevance.values
        for i, value in enumerate(relevance.values[sequence.name])
        if not sequence.special[i] and (sequence.name, i) != (choice.sequence, choice.unit)
    ]


def strongest(explanation: Explanation, choice: Choice, relevance: Relevance) -> float:
    """The value that has the full colour: the largest of what was read."""
    values = (abs(value) for _, value in read(explanation, choice, relevance))
    return max(values, default=0.0) or 1.0


def generates(explanation: Explanation) -> bool:
    """Whether the choices are one text, token by token."""
    return explanation.family in ("gpt", "transformer")


def given(explanation: Explanation) -> str:
    """The input as one text."""
    sequence = explanation.sequences[0]
    if explanation.picture is not None:
        return "an image"
    last = explanation.choices[0].unit if explanation.family == "gpt" else len(sequence.units)
    places = [i for i in _legible(sequence) if i <= last]
    if not sequence.segments:
        return "".join(sequence.units[i] for i in places).strip()
    texts = ["".join(sequence.units[i] for i in places if sequence.segments[i] == s) for s in (0, 1)]
    return " | ".join(text.strip() for text in texts if text)


def _legible(sequence: Units) -> Iterator[int]:
    """The units that are text, and not markers.

    Neither word nor white space are the first bytes of a letter, whose last one has all of it.
    """
    for i, (unit, special, word) in enumerate(
        zip(sequence.units, sequence.special, sequence.words, strict=True)
    ):
        if not special and (word >= 0 or unit.isspace()):
            yield i


def why(explanation: Explanation) -> str:
    """The question that is answered."""
    answer = shortened(answered(explanation), 60)
    first = explanation.choices[0]
    if first.outcome == "value":
        return f"Why {answer} {amount(first)}?"
    return f"Why “{answer}” {amount(first)}?" if first.outcome == "label" else f"Why “{answer}”?"


def asked(explanation: Explanation) -> str:
    """Which model read what, and what it answered or was asked about, in a sentence."""
    text = shortened(given(explanation), 160)
    said = f"{explanation.model} read {text if explanation.picture is not None else f'“{text}”'}"
    answer = shortened(answered(explanation), 160)
    first, *more = explanation.choices
    if first.outcome == "value":
        return f"{said}: {answer} {amount(first)}."
    if explanation.target is None or all(
        one.answer == one.alternatives[0].name for one in explanation.choices
    ):
        if first.outcome == "label":
            return f"{said} and finds “{answer}” likeliest, {amount(first)} probable."
        return f"{said} and answered “{answer}”" + ("." if more else f", {amount(first)} sure.")
    said = f"{said} and was asked about “{answer}”"
    best = first.alternatives[0]
    likeliest = f"likeliest is “{visible(best.name)}”, {percent(best.probability)}"
    return f"{said}." if more else f"{said}, which it finds {amount(first)} probable; {likeliest}."


def words_of(sequence: Units) -> list[str]:
    """The words of a text, as its tokens spell them."""
    made = [""] * (1 + max(sequence.words, default=-1))
    for unit, word in zip(sequence.units, sequence.words, strict=True):
        if word >= 0:
            made[word] += unit
    return [word.strip() for word in made]


def visible(unit: str) -> str:
    """A token as it can be seen: what has no ink by signs or by its number; spaces around it are left out."""
    seen = "".join(_SIGNS.get(letter) or _seen(letter) for letter in unit)
    return seen.strip(" ") or "␣" * len(seen) or "∅"


_SIGNS = {"\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽", "\u200c": "\u200c", "\u200d": "\u200d"}
"""Joiners stay: they make one picture of several, and shape letters."""


def _seen(letter: str) -> str:
    return f"⟨{ord(letter):x}⟩" if unicodedata.category(letter) in ("Cc", "Cf", "Zl", "Zp") else letter


def amount(choice: Choice) -> str:
    """How probable an answer is, or where it is a value, that."""
    return f"{choice.probability:.4g}" if choice.outcome == "value" else percent(choice.probability)


def leading(choice: Choice) -> Relevance | None:
    """The map to show first: by attention and gradients together if there is one."""
    found = {one.method: one for one in choice.relevances}
    return found.get("relevance") or next(iter(found.values()), None)


def percent(probability: float) -> str:
    """As in 93 %, or 0.4 % where no digits would say 0."""
    share = 100 * probability
    if 0 < share < 0.1:
        return "under 0.1 %"
    return f"{share:.1f} %" if 0 < share < 9.95 else f"{share:.0f} %"


def shortened(text: str, most: int) -> str:
    """A text in one line, its end cut where it has more characters than that."""
    line = " ".join("".join(letter if letter.isspace() else _seen(letter) for letter in text).split())
    return line if len(line) <= most else line[: most - 1].rstrip() + "…"
