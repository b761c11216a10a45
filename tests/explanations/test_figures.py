"""Figures for papers: the same in SVG and PNG, every value where it belongs, mistakes in one line."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from explanations import made
from qkv.config import FigureOptions
from qkv.errors import InputError
from qkv.explanations.drawing import COOL, WARM, Box, Drawing, Label, tinted, width_of
from qkv.explanations.figures import _matrix, figure, heat
from qkv.explanations.plain import from_json
from qkv.explanations.save import save

SVG = "{http://www.w3.org/2000/svg}"
HEAD = FigureOptions(figure="attention", stack="cross", layer=1, head=2)


def boxes(drawing: Drawing) -> list[Box]:
    return [shape for shape in drawing.shapes if isinstance(shape, Box)]


def test_a_head_is_a_square_for_every_weight():
    explanation = made.translated()
    drawing = figure(explanation, HEAD)
    weights = explanation.attention[2].weights[1, 2].astype(np.float32)
    expected = [tinted(COOL, 0.04 + 0.96 * weight**0.5) for weight in weights.ravel().tolist()]
    assert [box.colour for box in boxes(drawing)] == expected
    labels = [shape.text for shape in drawing.shapes if isinstance(shape, Label)]
    assert labels[2:] == [unit.strip() for name in (1, 0) for unit in explanation.sequences[name].units]


def test_links_of_an_alignment_are_outlined():
    explanation = made.translated()
    drawing = figure(explanation, FigureOptions(figure="alignment"))
    cells = [box for box in boxes(drawing) if not box.outlined]
    rows, columns = explanation.alignment.matrix.shape
    around = [(round(box.x), round(box.y)) for box in boxes(drawing) if box.outlined]
    corners = {(round(box.x), round(box.y)): i for i, box in enumerate(cells)}
    found = [divmod(corners[(x - 1, y - 1)], columns) for x, y in around]
    assert found == [(target, source) for source, target in explanation.alignment.links]
    assert len(cells) == rows * columns


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("make", [made.sentence, made.pair, made.generated, made.translated])
def test_a_strip_has_every_token_in_its_colour_within_the_page(make, last):
    """Of the first choice, whose answer is read further on, and of the last, whose answer is read by none."""
    explanation = make()
    number = len(explanation.choices) - 1 if last else 0
    drawing = figure(explanation, FigureOptions(map="integrated_gradients", choice=number))
    choice = explanation.choices[number]
    written = explanation.family in ("gpt", "transformer")
    (relevance,) = [one for one in choice.relevances if one.method == "integrated_gradients"]
    values = np.concatenate([relevance.values[sequence.name] for sequence in explanation.sequences])
    special = np.concatenate([sequence.special for sequence in explanation.sequences])
    special[choice.unit + len(values) - len(relevance.values[choice.sequence])] = True
    shares = np.clip(values / np.abs(values[~special]).max(), -1, 1)  # neither markers nor the choice's own
    tokens = [box for box in boxes(drawing) if not box.outlined]
    assert [box.colour for box in tokens] == [
        tinted(WARM if share >= 0 else COOL, 0.6 * abs(float(share)))
        for share in (*shares, *[0.0] * (written and last))
    ]
    outlined = [(box.x + 2, box.y) for box in boxes(drawing) if box.outlined]
    answer = len(values) - len(relevance.values[choice.sequence]) + choice.unit + 1
    assert outlined == [(box.x, box.y) for box in tokens[answer : answer + 1]] * written
    for box in boxes(drawing):
        assert box.x >= 0 and box.x + box.width <= drawing.width and box.y + box.height <= drawing.height


@pytest.mark.parametrize("options", [HEAD, FigureOptions(), FigureOptions(figure="alignment")])
def test_svg_and_png_show_the_same(options):
    drawing = figure(made.translated(), options)
    image = np.array(Image.open(BytesIO(drawing.png(scale=1))))
    assert image.shape[:2] == (round(drawing.height), round(drawing.width))
    root = ElementTree.fromstring(drawing.svg())
    plain = [one for one in root.iter(f"{SVG}rect") if one.get("fill") not in ("none", "#fff")]
    assert len(plain) == sum(not box.outlined for box in boxes(drawing))
    outlines = {one.get("stroke") for one in root.iter(f"{SVG}rect") if one.get("stroke")}
    for one in plain:
        left, top = (round(float(one.get(name))) for name in "xy")
        assert "#" + bytes(image[top + 1, left + 1]).hex() in (one.get("fill"), *outlines)
    texts = [one.text for one in root.iter(f"{SVG}text")]
    assert texts == [shape.text for shape in drawing.shapes if isinstance(shape, Label)]


def test_a_label_is_where_it_is_said_to_be():
    """Its letters' ink lies between its ends, in each of the four ways to place it."""
    for anchor in ("start", "end"):
        for upward in (False, True):
            drawing = Drawing(200, 200, [Label(100, 100, "mm", anchor, upward)])
            ink = np.argwhere(np.array(Image.open(BytesIO(drawing.png(scale=1))).convert("L")) < 128)
            rows, columns = ink[:, 0], ink[:, 1]
            along, across = (100 - rows, columns - 100) if upward else (columns - 100, rows - 100)
            low, high = (0, width_of("mm")) if anchor == "start" else (-width_of("mm"), 0)
            assert low - 2 <= along.min() and along.max() <= high + 2
            assert np.abs(across).max() < 8


def test_a_map_covers_exactly_the_pixels_of_each_patch():
    picture = made.seen(height=7, width=10, rows=2, columns=3).picture
    values = np.array([9, 1, 0, 0, 0, 0, -0.5], np.float32)  # of the class token, and of six patches
    shown = heat(picture, values, opacity=1.0)
    red, green, blue = np.moveaxis(picture.pixels.astype(float), -1, 0)
    expected = np.stack([0.2126 * red + 0.7152 * green + 0.0722 * blue] * 3, axis=-1)  # Rec. 709
    assert np.abs(heat(picture, 0 * values, opacity=1.0) - expected).max() <= 0.51
    expected[:3, :3] = (255, 90, 31)
    expected[3:, 6:] = expected[3:, 6:] / 2 + np.array([47, 107, 255]) / 2
    assert np.abs(shown - expected).max() <= 0.51
    assert np.array_equal(heat(picture, values, opacity=0.0), picture.pixels)


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (made.sentence, FigureOptions(figure="alignment"), "a bert model aligns nothing"),
        (made.sentence, FigureOptions(map="flow"), "no map by flow; it has relevance, rollout"),
        (made.sentence, FigureOptions(choice=1), "no choice 1: there are 1"),
        (
            made.sentence,
            FigureOptions(figure="attention", stack="cross"),
            "no cross attention; it has encoder",
        ),
        (made.sentence, FigureOptions(figure="attention", layer=7), "no layer 7 in encoder attention"),
        (
            made.sentence,
            FigureOptions(figure="attention", head=4),
            "no head 4 in encoder attention; there are 0, 1",
        ),
    ],
)
def test_what_is_not_there_is_said(make, options, said: str):
    with pytest.raises(InputError, match=said):
        figure(make(), options)


def test_letters_that_no_font_has_are_named():
    with pytest.raises(InputError, match=r"\(“\ue000”\): save the figure as .svg"):
        Drawing(50, 50, [Label(0, 20, "a\ue000")]).png()


def test_a_file_is_what_its_ending_says(tmp_path: Path):
    explanation = made.sentence()
    for name in ("a.html", "a.json", "a.svg", "a.png"):
        save(explanation, tmp_path / name)
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    assert from_json((tmp_path / "a.json").read_text()).choices[0].answer == "positive"
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag == f"{SVG}svg"
    assert Image.open(tmp_path / "a.png").format == "PNG"
    save(explanation, tmp_path / "both.html", compare=made.sentence(seed=1))
    assert "What is different?" in (tmp_path / "both.html").read_text()


def test_other_files_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"saved as .html, .png, .svg, .json; .*a.pdf is not called so"):
        save(made.sentence(), tmp_path / "a.pdf")
    with pytest.raises(InputError, match=r"side by side are saved as .html"):
        save(made.sentence(), tmp_path / "a.png", compare=made.sentence())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["\u0301", "e\u0301", "日", ""])
def test_a_mark_without_a_letter_has_a_width(text: str):
    assert (width_of(text) > 0) == bool(text)


def test_more_weights_than_can_be_seen_are_not_drawn():
    with pytest.raises(InputError, match=r"300 times 300 weights is too large .*\.html"):
        _matrix([""] * 300, [""] * 300, np.zeros((300, 300), np.float16), ("reads", "read"))
