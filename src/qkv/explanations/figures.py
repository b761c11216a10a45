"""Figures for papers: one map of an explanation as a drawing.

Legend: U units, R rows and C columns of a matrix or of an image's patches, h and w pixels of an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from qkv.config import FigureOptions
from qkv.errors import InputError
from qkv.explanations.drawing import (
    COOL,
    INK,
    PALE,
    SIZE,
    SOFT,
    WARM,
    Box,
    Drawing,
    Label,
    Pixels,
    tinted,
    width_of,
)
from qkv.explanations.explanation import Choice, Explanation, Floats, Picture, Relevance, Units
from qkv.explanations.words import generates, leading, strongest, visible, words_of

_MARGIN, _LINE, _WIDTH = 12.0, 26.0, 640.0
_CELL = 18.0
_CELLS = 200 * 200
"""Most weights that are drawn, 3,600 pixels a side."""
_STRENGTH = 0.6
"""How strong the colour of the most relevant token is: it must stay readable."""


def figure(explanation: Explanation, options: FigureOptions) -> Drawing:
    """What the options name. Raises InputError for what the explanation does not have."""
    match options.figure:
        case "relevance":
            choice = _choice(explanation, options.choice)
            relevance = _relevance(choice, options.map)
            if explanation.picture is not None:
                return _over_image(explanation.picture, relevance.values["image"])
            return _strips(explanation, choice, relevance)
        case "attention":
            return _head(explanation, options)
        case "alignment":
            return _alignment(explanation)


def heat(picture: Picture, values: Floats, opacity: float = 0.75) -> np.ndarray:
    """The image's pixels (h, w, 3) under a map of its units (U,), each patch over exactly its own pixels.

    The more opaque the map, the greyer is the image, so that the map's colours stand out.
    """
    height, width, _ = picture.pixels.shape
    rows, columns = picture.grid
    patches = values[1:].reshape(rows, columns)  # (R, C); unit 0 is the class token
    row, column = (  # the patch of each pixel: patch r starts at pixel r * height // rows
        np.searchsorted(np.arange(count) * size // count, np.arange(size), side="right") - 1
        for count, size in ((rows, height), (columns, width))
    )
    shares = patches[np.ix_(row, column)] / max(float(np.abs(patches).max()), 1e-30)  # (h, w)
    alpha = opacity * np.abs(shares)[..., None]
    colours = np.where(shares[..., None] < 0, np.array(_AGAINST), np.array(_TOWARDS))
    grey = picture.pixels @ np.array(_LUMINANCE)  # (h, w)
    image = picture.pixels * (1 - opacity) + grey[..., None] * opacity
    blended: np.ndarray = np.rint(image * (1 - alpha) + colours * alpha).astype(np.uint8)
    return blended


_TOWARDS, _AGAINST = (255, 90, 31), (47, 107, 255)
"""Over images colours must be stronger than over paper."""
_LUMINANCE = (0.2126, 0.7152, 0.0722)
"""Of red, green and blue: what CSS calls grayscale."""


def _choice(explanation: Explanation, number: int) -> Choice:
    if not 0 <= number < len(explanation.choices):
        raise InputError(f"there is no choice {number}: there are {len(explanation.choices)}, counted from 0")
    return explanation.choices[number]


def _relevance(choice: Choice, method: str) -> Relevance:
    asked = (one for one in choice.relevances if one.method == method)
    found = next(asked, None) if method else leading(choice)
    if found is not None:
        return found
    known = ", ".join(relevance.method for relevance in choice.relevances) or "none"
    raise InputError(f"the explanation has no map by {method or 'any method'}; it has {known}")


def _over_image(picture: Picture, values: Floats) -> Drawing:
    height, width, _ = picture.pixels.shape
    zoom = max(1, 448 // max(height, width))
    drawing = Drawing(width * zoom, height * zoom)
    drawing.add([Pixels(0, 0, heat(picture, values), zoom)])
    return drawing


def _strips(explanation: Explanation, choice: Choice, relevance: Relevance) -> Drawing:
    """Each sequence as running text, coloured by relevance."""
    drawing = Drawing(_WIDTH, _MARGIN)
    most = strongest(explanation, choice, relevance)
    for sequence in explanation.sequences:
        if (values := relevance.values.get(sequence.name)) is None:
            continue
        read = len(sequence.units)
        if generates(explanation) and sequence.name == choice.sequence:
            if choice.unit + 1 == read:  # the last answer, which was not read by a further one
                units, special = (*sequence.units, choice.answer), (*sequence.special, False)
                sequence = replace(sequence, units=units, special=special)
                values = np.append(values, np.float32(0))
            read = choice.unit + 1
        tokens = list(_strip(sequence, np.clip(values / most, -1, 1), drawing.height, read))
        drawing.add(tokens)
        drawing.height = tokens[-1].y + _LINE / 2 + _MARGIN
    return drawing


def _strip(sequence: Units, shares: Floats, top: float, read: int) -> Iterator[Box | Label]:
    """Its tokens, from a height down, in as many lines as they need.

    read: so many of a text that is written were there; the next, outlined, is the answer, and the rest pale.
    """
    x, y, space = _MARGIN, top + _LINE / 2, width_of(" ")
    segments = sequence.segments or (0,) * len(sequence.units)
    for i, (unit, share) in enumerate(zip(sequence.units, shares, strict=True)):
        text = visible(unit)
        width = width_of(text)
        x += space if unit.startswith(" ") and x > _MARGIN else 0
        ended = i > 0 and ("\n" in sequence.units[i - 1] or segments[i] != segments[i - 1])
        if ended or (x > _MARGIN and x + width > _WIDTH - _MARGIN):
            x, y = _MARGIN, y + _LINE
        colour = tinted(WARM if share >= 0 else COOL, _STRENGTH * abs(float(share)))
        box = Box(x, y - SIZE * 0.8, width, SIZE * 1.6, colour)
        yield box
        if i == read:
            yield replace(box, x=x - 2, width=width + 4, colour=INK, outlined=True)
        yield Label(x, y, text, colour=PALE if i > read else SOFT if sequence.special[i] else INK)
        x += width + (space if sequence.special[i] else 0)


def _head(explanation: Explanation, options: FigureOptions) -> Drawing:
    """One head's matrix."""
    stacks = {one.stack: one for one in explanation.attention}
    name = options.stack or next(iter(stacks), "")
    if name not in stacks:
        raise InputError(
            f"the explanation has no {name or 'recorded'} attention; it has {', '.join(stacks) or 'none'}"
        )
    stack = stacks[name]
    if options.layer not in stack.layers:
        raise InputError(
            f"there is no layer {options.layer} in {name} attention; there are {_listed(stack.layers)}"
        )
    heads = stack.heads or tuple(range(stack.weights.shape[1]))
    if options.head not in heads:
        raise InputError(f"there is no head {options.head} in {name} attention; there are {_listed(heads)}")
    place = stack.layers.index(options.layer), heads.index(options.head)
    weights = stack.weights[place].astype(np.float32)
    names = {str(sequence.name): sequence.units for sequence in explanation.sequences}
    return _matrix(names[stack.queries], names[stack.keys], weights, ("looks", "is looked at"))


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _alignment(explanation: Explanation) -> Drawing:
    """Words of the translation by words of the source, the links outlined."""
    if explanation.alignment is None:
        raise InputError(f"a {explanation.family} model aligns nothing: alignments are of translations")
    names = {sequence.name: words_of(sequence) for sequence in explanation.sequences}
    matrix, links = explanation.alignment.matrix, explanation.alignment.links
    marks = [(target, source) for source, target in links]
    return _matrix(names["target"], names["source"], matrix, ("translation", "source"), marks)


def _matrix(
    rows: Sequence[str],
    columns: Sequence[str],
    weights: Floats,
    axes: tuple[str, str],
    marks: Sequence[tuple[int, int]] = (),
) -> Drawing:
    """A square for each weight, stronger by its square root, as on the page; marks: cells to outline."""
    across, down = f"{axes[1]} →", f"← {axes[0]}"
    R, C = weights.shape
    if weights.size > _CELLS:
        raise InputError(
            f"a figure of {R:,} times {C:,} weights is too large to look at: write a page (.html)"
        )
    left = 2 * _LINE + max(width_of(visible(name)) for name in rows)
    top = 2 * _LINE + max(width_of(visible(name)) for name in columns)
    drawing = Drawing(
        left + max(C * _CELL, width_of(across)) + _MARGIN, top + max(R * _CELL, width_of(down)) + _MARGIN
    )
    drawing.add([Label(left, _MARGIN, across, colour=SOFT)])
    drawing.add([Label(_MARGIN, top, down, "end", upward=True, colour=SOFT)])
    drawing.add(
        Box(left + c * _CELL, top + r * _CELL, _CELL, _CELL, tinted(COOL, 0.04 + 0.96 * float(weight) ** 0.5))
        for (r, c), weight in np.ndenumerate(weights)
    )
    drawing.add(
        Box(left + c * _CELL + 1, top + r * _CELL + 1, _CELL - 2, _CELL - 2, WARM, outlined=True)
        for r, c in marks
    )
    drawing.add(Label(left - 6, top + (r + 0.5) * _CELL, visible(name), "end") for r, name in enumerate(rows))
    drawing.add(
        Label(left + (c + 0.5) * _CELL, top - 6, visible(name), upward=True) for c, name in enumerate(columns)
    )
    return drawing
