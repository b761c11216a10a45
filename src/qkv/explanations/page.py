"""One offline HTML file that shows an explanation, or two side by side.

Python writes the document and the values; `assets/*.js` draws them. The page may load nothing and runs this
script alone: its content security policy names the script and the style by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from difflib import SequenceMatcher
from html import escape
from importlib import resources
from typing import Any

import numpy as np

from qkv.explanations.explanation import Explanation, Floats, Relevance, Units
from qkv.explanations.packing import BUDGET, pack, pack_attention, quantise
from qkv.explanations.plain import to_plain
from qkv.explanations.words import (
    METHODS,
    asked,
    generates,
    given,
    leading,
    read,
    shortened,
    strongest,
    why,
    words_of,
)
from qkv.report.page import document, style
from qkv.report.pictures import png

_SCRIPTS = (
    "dom",
    "state",
    "units",
    "weights",
    "matrix",
    "image",
    "answer",
    "faithfulness",
    "relevance",
    "attention",
    "alignment",
    "page",
)
"""Files of the script, the one that starts it last."""


def page(explanation: Explanation) -> str:
    """A document in HTML. Weights are rounded, and of long inputs the least left out: it says which."""
    return _page(why(explanation), explanation)


def compare_page(first: Explanation, second: Explanation) -> str:
    """A document that shows two explanations side by side: of two checkpoints, or of two inputs."""
    return _page("What is different?", first, second)


def frame(explanation: Explanation) -> str:
    """The page as an element of another one, such as a notebook, with which it shares nothing."""
    inner = escape(page(explanation))
    return (
        f'<iframe sandbox="allow-scripts" srcdoc="{inner}" title="{escape(asked(explanation))}" '
        'style="width:100%;height:720px;border:0" loading="lazy"></iframe>'
    )


def _page(title: str, *shown: Explanation) -> str:
    script = "\n".join(_asset(f"{name}.js") for name in _SCRIPTS)
    look = style() + _asset("page.css")
    first = leading(shown[0].choices[0])
    values: dict[str, Any] = {
        "method": first and first.method,
        "explanations": [_values(one, BUDGET // len(shown)) for one in shown],
        "methods": {name: words._asdict() for name, words in METHODS.items()},
    }
    if len(shown) == 2:
        values["matches"] = _matches(*shown)
    policy = (
        f"default-src 'none'; img-src data:; script-src {_hash(script)}; style-src {_hash(look)}; "
        "base-uri 'none'; form-action 'none'"
    )
    lead = "".join(f"<p>{escape(asked(one))}</p>" for one in shown)
    head = f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
    body = (
        f'<header><h1 dir="auto">{escape(title)}</h1>{lead}</header>\n<main></main>\n'
        "<noscript><p>This page draws its figures with a script of its own: allow it to run.</p></noscript>\n"
        f'<script type="application/json" id="values">{_embedded(values)}</script>\n'
        f'<script type="module">{script}</script>\n'
    )
    return document(title, body, look, head)


def _asset(name: str) -> str:
    return resources.files("qkv.explanations").joinpath("assets", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a content security policy names an element by its text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _embedded(values: dict[str, Any]) -> str:
    """JSON that no text in it can end: every < is written by its number."""
    text = json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _values(explanation: Explanation, budget: int) -> dict[str, Any]:
    """All that the script draws: the fields of `Explanation`, but matrices packed and pixels as an image."""
    stacks, least = pack_attention(explanation.attention, budget, explanation.picture)
    choices = tuple(
        replace(choice, relevances=tuple(replace(one, matrix={}) for one in choice.relevances))
        for choice in explanation.choices
    )
    values: dict[str, Any] = to_plain(replace(explanation, attention=(), choices=choices, picture=None))
    values["input"] = shortened(given(explanation), 80)
    values["generates"] = generates(explanation)
    values["least"] = least
    for stack, packed in zip(explanation.attention, stacks, strict=True):
        heads = stack.heads or tuple(range(stack.weights.shape[1]))
        about = to_plain(replace(stack, weights=np.empty(0, np.float16), heads=heads))
        values["attention"].append(about | {"weights": None} | to_plain(packed))
    for shown, choice in zip(values["choices"], explanation.choices, strict=True):
        for one, relevance in zip(shown["relevances"], choice.relevances, strict=True):
            del one["matrix"]
            one["strongest"] = strongest(explanation, choice, relevance)
            one["total"] = sum(abs(value) for _, value in read(explanation, choice, relevance)) or 1.0
            one["across"] = _across(relevance, explanation.sequences[0])
            if relevance.faithfulness is not None:
                one["faithfulness"]["verdict"] = relevance.faithfulness.verdict
    if explanation.picture is not None:
        height, width, _ = explanation.picture.pixels.shape
        values["picture"] = {
            "image": png(explanation.picture.pixels),
            "height": height,
            "width": width,
            "grid": explanation.picture.grid,
        }
    if explanation.alignment is not None:
        names = {sequence.name: words_of(sequence) for sequence in explanation.sequences}
        values["alignment"] |= {"pharaoh": explanation.alignment.pharaoh, "words": names}
    return values


def _across(relevance: Relevance, sequence: Units) -> dict[str, Any] | None:
    """Of a pair of texts: what the tokens of each took from those of the other, packed."""
    matrix = relevance.matrix.get("encoder")
    if matrix is None or not any(sequence.segments):
        return None
    segments, special = np.array(sequence.segments), np.array(sequence.special)
    first, second = (np.flatnonzero((segments == s) & ~special) for s in (0, 1))
    blocks: list[Floats] = [matrix[np.ix_(first, second)], matrix[np.ix_(second, first)]]
    scale = max(float(block.max(initial=0.0)) for block in blocks)
    if scale == 0:  # each was read by itself
        return None
    return {
        "units": [first.tolist(), second.tolist()],
        "scale": scale,
        "blocks": [pack(quantise(block / np.float32(scale))) for block in blocks],
    }


def _matches(first: Explanation, second: Explanation) -> dict[str, list[tuple[int, int]]]:
    """By sequence that both have: pairs of units that stand for each other."""
    theirs = {sequence.name: sequence.units for sequence in second.sequences}
    return {
        sequence.name: list(_common(sequence.units, theirs[sequence.name]))
        for sequence in first.sequences
        if sequence.name in theirs
    }


def _common(first: tuple[str, ...], second: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    for block in SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks():
        yield from zip(
            range(block.a, block.a + block.size), range(block.b, block.b + block.size), strict=True
        )
