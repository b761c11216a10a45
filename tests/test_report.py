"""The report: one file that loads nothing, in which whatever is given is text."""

from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkv.demo.lab import Part
from qkv.report.page import (
    Card,
    Figure,
    Measure,
    Scores,
    Section,
    continuation,
    filled,
    page,
    score_table,
    shares,
    table,
)
from qkv.report.pictures import gallery, heatmap, overlay
from qkv.report.plot import Line, _ticks, curve, plot

VOID = {"meta", "img", "br", "hr", "link", "input"}
NASTY = '<script src="https://example.org/x.js">&\'"</script>'


class Page(HTMLParser):
    """What a browser would find: tags, their attributes, balance, text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def assert_self_contained(html: str) -> Page:
    found = Page(html)
    assert found.open == []
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in found.tags}
    for _, attributes in found.tags:
        for name in ("src", "href", "xlink:href", "data", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), value
    assert "url(" not in html and "@import" not in html
    return found


SCORES = Scores(
    (Measure("loss", 2, lower_is_better=True), Measure("right", percent=True)),
    {"ours": (1.5, 0.75), "theirs": (1.25, None), NASTY: (2.0, 0.8)},
    frozenset({"ours"}),
)


def whole_page() -> str:
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4)
    weights = np.array([[1.0, 0.0], [0.25, 0.75]], dtype=np.float32)
    figures = (
        Figure(NASTY, table((NASTY,), [(NASTY,)]), NASTY),
        Figure("text", continuation(NASTY, NASTY) + filled(NASTY, NASTY, [(NASTY, 0.5)], NASTY)),
        Figure("images", gallery([(pixels, NASTY, False)]) + overlay(pixels, weights, NASTY)),
        Figure("map", heatmap([NASTY, "b"], ["c", NASTY], weights, NASTY, NASTY), wide=True),
        Figure("scores", score_table(SCORES) + shares((NASTY, "share"), [(NASTY, [0.25])])),
        Figure("curve", curve([(1, 3.0), (10, 2.0)], [(10, 2.5)], NASTY)),
        Figure("plot", plot([Line(NASTY, [(1, 3.0)], "other", dots=True)], NASTY, NASTY)),
    )
    card = Card(NASTY, NASTY, NASTY, "one")
    return page(NASTY, NASTY, [card], [Section("one", NASTY, NASTY, {NASTY: NASTY}, figures)])


def test_the_page_loads_nothing_and_shows_all_text_as_it_is():
    found = assert_self_contained(whole_page())
    assert NASTY in found.text
    assert found.all("html") == [{"lang": "en"}]
    assert {"id": "one"} in found.all("section")


def test_pictures_have_names_for_those_who_do_not_see_them():
    found = assert_self_contained(whole_page())
    assert all(image["alt"] for image in found.all("img"))
    assert all(svg["aria-label"] and svg["role"] == "img" for svg in found.all("svg"))


def test_the_best_of_each_column_is_bold_whoever_has_it():
    html = score_table(SCORES)
    assert "<b>1.25</b>" in html and "<b>80.0 %</b>" in html
    assert html.count("<b>") == 2


def test_the_overview_sets_the_model_beside_the_best_baseline():
    card = Part("one", "One: more", "", {}, SCORES, ()).card()
    assert (card.title, card.value, card.caption) == ("One", "1.50", "loss; best baseline 1.25")


def test_heatmap_draws_each_weight_at_its_row_and_column():
    weights = np.array([[0.0, 0.5, 0.0], [0.0, 0.0, 0.25]], dtype=np.float32)
    squares = Page(heatmap(["a", "b"], ["x", "y", "z"], weights, "r", "c")).all("rect")
    cells = [square for square in squares if square["class"] == "cell"]
    assert [(float(c["x"]), float(c["y"]), float(c["fill-opacity"])) for c in cells] == [
        (14.0, 0.0, 0.5),
        (28.0, 14.0, 0.25),
    ]


def test_curve_goes_down_where_the_loss_does():
    line = next(p for p in Page(curve([(1, 4.0), (2, 2.0)], [(2, 3.0)], "nats")).all("polyline"))
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in line["points"].split())
    assert x0 < x1 and y0 < y1  # SVG counts downwards


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_and_cover_the_range_to_a_step(low: float, span: float):
    ticks = _ticks(low, low + span)
    assert 2 <= len(ticks) <= 10
    assert ticks[0] <= low + 1e-6 * max(1, abs(low))
    step = ticks[1] - ticks[0]
    assert ticks[-1] + step >= low + span - 1e-6 * max(1, abs(low))


@pytest.mark.parametrize("constant", [0.0, 3.5])
def test_curve_of_a_constant_loss_is_drawn(constant: float):
    assert_self_contained(curve([(1, constant)], [(1, constant)], "nats"))


def test_a_long_curve_is_thinned_but_ends_where_it_ends():
    points = [(float(i), 1.0 / i) for i in range(1, 10_001)]
    (line,) = Page(plot([Line("loss", points)], "loss", "nats")).all("polyline")
    whole = Page(plot([Line("loss", points[:2]), Line("loss", points[-1:])], "", "")).all("polyline")[1]
    corners = line["points"].split()
    assert len(corners) < 500 and corners[-1].split(",")[0] == whole["points"].split(",")[0]
