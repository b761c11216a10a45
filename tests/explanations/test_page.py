"""The page in a real browser with the network cut: what it shows, what it does, and that it loads nothing."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, ViewportSize, expect, sync_playwright

from explanations import made
from explanations.subjects import CASES
from qkv.explanations.explainer import explain
from qkv.explanations.explanation import Guess, Relevance
from qkv.explanations.figures import heat
from qkv.explanations.packing import BUDGET, quantise, thumbnails
from qkv.explanations.page import compare_page, frame, page
from qkv.explanations.words import percent

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
ROUNDED = 0.004
"""By how much a weight may be off, as the page says."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


Open = Callable[..., Page]
VIEWPORT: ViewportSize = {"width": 1180, "height": 900}


class Tabs:
    """Tabs without a network, in which a document may load itself alone; and all that they complained of."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        self.documents: set[str] = set()
        self.complaints: list[str] = []
        self.usual = self.new()

    def new(self, **options) -> Page:
        context = self.browser.new_context(viewport=VIEWPORT, **options)
        context.set_offline(True)
        context.route(lambda url: url not in self.documents and not url.startswith("data:"), self._refuse)
        tab = context.new_page()
        tab.on("console", lambda message: self.complaints.append(message.text))
        tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        return tab

    def _refuse(self, route) -> None:
        self.complaints.append(route.request.url)
        route.abort()


@pytest.fixture(scope="module")
def tabs(browser: Browser) -> Tabs:
    return Tabs(browser)


@pytest.fixture
def opened(tabs: Tabs, tmp_path: Path) -> Iterator[Open]:
    """A document opened from disk without a network, which asks for nothing and complains of nothing."""

    def open_page(html: str, **options) -> Page:
        file = tmp_path / "page.html"
        file.write_text(html, encoding="utf-8")
        tabs.documents = {file.as_uri()}
        tab = tabs.new(**options) if options else tabs.usual  # a new one takes longer than most tests
        tab.set_viewport_size(VIEWPORT)
        tab.emulate_media(color_scheme="light", reduced_motion="reduce")
        tab.mouse.move(0, 0)
        tab.goto(file.as_uri())
        return tab

    tabs.complaints.clear()
    yield open_page
    assert tabs.complaints == []


def detail(tab: Page):
    """The card of one head, once its weights are there."""
    card = tab.locator("article", has=tab.locator("h3", has_text=re.compile(r"^Layer \d+, head \d+$")))
    expect(card.first).to_be_visible()
    return card


def weights_of(items) -> list[float]:
    return [float(value) for value in items.evaluate_all("all => all.map(one => one.dataset.weight)")]


def choose(tab: Page, name: str) -> None:
    tab.locator(".chooser label", has_text=re.compile(f"^{re.escape(name)}$")).click()


FAMILIES = {
    "bert": made.sentence,
    "pair": made.pair,
    "gpt": made.generated,
    "transformer": made.translated,
    "vit": made.seen,
}


REAL = ["gpt", "transformer", "bert-pair", "bert-masked", "bert-tagging", "bert-similarity", "vit"]


@pytest.mark.parametrize("name", REAL)
def test_what_explain_finds_is_shown(opened: Open, name: str):
    """Of models of every family, untrained, and each step and method of it."""
    pipeline, given, target = CASES[name]()
    explanation = explain(pipeline, given, target, max_new_tokens=3, random_orders=2)
    tab = opened(page(explanation))
    detail(tab)
    for relevance in explanation.choices[0].relevances:
        choose(tab, relevance.method.replace("_", " ").capitalize())
        assert relevance.faithfulness is not None
        expect(tab.locator(".verdict")).to_have_text(relevance.faithfulness.verdict)
    expect(tab.locator(".choice")).to_have_count(len(explanation.choices[1:] and explanation.choices))
    units = sum(len(sequence.units) for sequence in explanation.sequences if sequence.name != "image")
    expect(tab.locator("#relevance .unit")).to_have_count(units)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_head_and_section_is_there_on_wide_and_narrow_screens(opened: Open, name: str):
    explanation = FAMILIES[name]()
    tab = opened(page(explanation))
    names = {"encoder": "encoder", "decoder": "decoder", "cross": "decoder to encoder"}
    for stack in explanation.attention:
        if len(explanation.attention) > 1:
            choose(tab, names[stack.stack])
        layers, heads = stack.weights.shape[:2]
        expect(tab.get_by_role("group", name="all heads").get_by_role("button")).to_have_count(layers * heads)
        detail(tab)
    expect(tab.locator("h2")).to_have_text(
        ["The answer", "What it rests on", "Where it looks", "Layer by layer"]
        + ["Word by word"] * (explanation.alignment is not None)
    )
    tab.set_viewport_size({"width": 360, "height": 700})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360


def test_only_what_is_there_is_shown(opened: Open):
    whole = made.sentence()
    bare = replace(whole.choices[0], relevances=(), lens=(), head_importance={})
    tab = opened(page(replace(whole, choices=(bare,), attention=())))
    expect(tab.locator("h2")).to_have_text(["The answer"])


def test_heads_are_called_by_their_own_numbers(opened: Open):
    """Of a few layers and heads, and the one to begin with is the one that the answer needs most."""
    whole = made.sentence()
    (stack,) = whole.attention
    few = replace(stack, weights=stack.weights[1:, [1, 3]], layers=(1, 2), heads=(1, 3))
    needed = np.zeros((3, 4), np.float32)
    needed[0, 0], needed[2, 3] = 2, 1
    choice = replace(whole.choices[0], head_importance={"encoder": needed})
    tab = opened(page(replace(whole, attention=(few,), choices=(choice,))))
    expect(detail(tab).locator("h3")).to_have_text("Layer 2, head 3")
    tab.get_by_role("button", name="layer 1, head 3", exact=True).click()
    expect(detail(tab).locator("h3")).to_have_text("Layer 1, head 3")
    shown = weights_of(detail(tab).locator(".key .unit"))
    assert shown == pytest.approx(stack.weights[1, 3, 0].astype(float), abs=ROUNDED)
    labels = tab.get_by_role("group", name="importance of heads").get_by_role("button")
    expect(labels).to_have_text(["·", "·", "·", "1.00"])


def test_a_value_is_not_called_a_probability(opened: Open):
    whole = made.sentence()
    choice = replace(
        whole.choices[0],
        answer="stars",
        probability=4.25,
        alternatives=(Guess("stars", 4.25),),
        outcome="value",
    )
    tab = opened(page(replace(whole, choices=(choice,))))
    expect(tab.locator("header p")).to_contain_text(": stars 4.25.")
    expect(tab.locator(".guesses")).to_have_text("stars+4.25")


def test_a_token_that_is_come_to_lights_what_it_looks_at(opened: Open):
    explanation = made.translated()
    tab = opened(page(explanation))
    choose(tab, "decoder to encoder")
    tab.get_by_role("button", name="layer 2, head 1", exact=True).click()
    card = detail(tab)
    expect(card.locator("h3")).to_have_text("Layer 2, head 1")
    truth = explanation.attention[2].weights[2, 1].astype(float)  # (Uq, Uk)
    units = [sequence.units for sequence in explanation.sequences]

    card.locator(".query .unit").nth(2).hover()
    assert weights_of(card.locator(".key .unit")) == pytest.approx(truth[2], abs=ROUNDED)
    best = units[0][truth[2].argmax()].strip()
    said = re.match(rf"“Hunde” looks at “{re.escape(best)}” (\d+) %", card.locator(".readout").text_content())
    assert float(said[1]) / 100 == pytest.approx(truth[2].max(), abs=0.005 + ROUNDED)

    card.locator(".key .unit").nth(1).hover()
    assert weights_of(card.locator(".query .unit")) == pytest.approx(truth[:, 1], abs=ROUNDED)
    expect(card.locator(".readout")).to_contain_text("“dogs” is looked at by")


def test_the_matrix_is_walked_through_with_arrows(opened: Open):
    explanation = made.sentence()
    tab = opened(page(explanation))
    card = detail(tab)
    title = card.locator("h3").text_content()
    layer, head = map(int, re.findall(r"\d+", title))
    truth = explanation.attention[0].weights[layer, head].astype(float)
    card.locator("canvas.matrix").focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowRight"):
        tab.keyboard.press(key)
    assert weights_of(card.locator(".key .unit")) == pytest.approx(truth[2], abs=ROUNDED)
    expect(card.locator(".readout")).to_contain_text(f"“wonder” looks at “wonder” {percent(truth[2, 2])}")


def test_thumbnails_are_the_weights(opened: Open):
    explanation = made.sentence()
    tab = opened(page(explanation))
    grid = tab.get_by_role("group", name="all heads")
    expect(grid).to_have_attribute("aria-busy", "false")
    small = thumbnails(quantise(explanation.attention[0].weights))
    shown = grid.locator("canvas")
    opacities = shown.evaluate_all(
        "all => all.map(one => Array.from("
        "one.getContext('2d').getImageData(0, 0, one.width, one.height).data.filter((_, i) => i % 4 === 3)))"
    )
    assert np.array_equal(np.array(opacities).reshape(small.shape), small)


def test_the_keyboard_goes_through_methods_heads_and_tokens(opened: Open):
    tab = opened(page(made.sentence()))
    detail(tab)
    tab.get_by_role("radio", name="Relevance", exact=True).focus()
    tab.keyboard.press("ArrowRight")
    expect(tab.locator("#relevance h3")).to_have_text("Rollout")
    tab.keyboard.press("Tab")
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowRight")
    expect(tab.locator("#relevance .readout")).to_contain_text("“wonder”")
    tab.keyboard.press("End")
    expect(tab.locator("#relevance .readout")).to_contain_text("“[SEP]”")

    grid = tab.get_by_role("group", name="all heads")
    grid.get_by_role("button").first.focus()
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowRight")
    expect(detail(tab).locator("h3")).to_have_text("Layer 1, head 1")
    assert grid.locator("[tabindex='0']").count() == 1  # one stop of the tab key


def test_fingers_do_as_pointers_do(opened: Open):
    tab = opened(page(made.sentence()), has_touch=True, is_mobile=True)
    tab.get_by_role("button", name="layer 0, head 2", exact=True).tap()
    card = detail(tab)
    expect(card.locator("h3")).to_have_text("Layer 0, head 2")
    card.locator(".query .unit").nth(4).tap()
    truth = made.sentence().attention[0].weights[0, 2, 4].astype(float)
    assert weights_of(card.locator(".key .unit")) == pytest.approx(truth, abs=ROUNDED)
    tab.locator("#relevance .unit").nth(1).tap()
    expect(tab.locator("#relevance .readout")).to_contain_text("“a”")


def test_generation_is_gone_through_step_by_step(opened: Open):
    explanation = made.generated()
    tab = opened(page(explanation))
    steps = tab.locator(".choice")
    expect(steps).to_have_count(len(explanation.choices))
    steps.first.click()
    for choice in explanation.choices:
        guesses = [
            guess.name.strip(" ").replace("\n", "↵").replace("\t", "⇥") or "␣␣␣␣"
            for guess in choice.alternatives
        ]
        expect(tab.locator(".guesses bdi")).to_have_text(guesses)
        values = tab.locator("#relevance .unit").evaluate_all(
            "all => all.map(one => Number(one.dataset.value))"
        )
        assert values == pytest.approx(choice.relevances[0].values["text"], rel=1e-6)
        later = tab.locator("#relevance .unit.later")
        expect(later).to_have_count(len(explanation.sequences[0].units) - choice.unit - 1)
        tab.keyboard.press("ArrowRight")


def test_each_tagged_word_is_a_choice(opened: Open):
    explanation = made.tagged()
    tab = opened(page(explanation))
    expect(tab.locator(".choice bdi")).to_have_text([choice.answer for choice in explanation.choices])
    tab.locator(".choice").nth(4).click()
    expect(tab.locator("#relevance .unit.answer")).to_have_text("York")
    values = tab.locator("#relevance .unit").evaluate_all("all => all.map(one => Number(one.dataset.value))")
    assert values == pytest.approx(explanation.choices[4].relevances[0].values["text"], rel=1e-6)


def test_beside_each_map_stands_whether_it_holds_up(opened: Open):
    explanation = made.sentence()
    tab = opened(page(explanation))
    for relevance in explanation.choices[0].relevances:
        name = relevance.method.replace("_", " ").capitalize()
        choose(tab, name)
        expect(tab.locator(".verdict")).to_have_text(relevance.faithfulness.verdict)
        for curve, random, figure in (
            (relevance.faithfulness.deletion, relevance.faithfulness.random_deletion, 0),
            (relevance.faithfulness.insertion, relevance.faithfulness.random_insertion, 1),
        ):
            shares = relevance.faithfulness.shares
            ours, theirs = np.trapezoid(curve, shares), np.trapezoid(random, shares, axis=1).mean()
            shown = tab.locator(".curves figcaption").nth(figure).text_content()
            areas = [float(number) for number in re.findall(r"\d\.\d+", shown)]
            assert areas == pytest.approx([ours, theirs], abs=0.0051)
            expect(tab.locator(".curves svg").nth(figure).locator("polyline.random")).to_have_count(
                len(random)
            )


def test_the_map_lies_on_the_image_to_the_pixel(opened: Open):
    """Patches have 8 x 10 pixels; each pixel is the image's under the colour of its own patch."""
    explanation = made.seen()
    choice = explanation.choices[0]
    values = np.zeros(37, np.float32)
    values[[1, 9, 22, 36]] = [1.0, 0.5, -0.75, 0.25]
    only = replace(choice, relevances=(Relevance("occlusion", {"image": values}),))
    tab = opened(page(replace(explanation, choices=(only,))))
    stage = tab.locator("#relevance .stage")
    stage.evaluate("one => one.style = 'position: fixed; inset: 0 auto auto 0; width: 360px; height: 288px'")
    for opacity in (1.0, 0.25, 0.0):
        tab.get_by_role("slider").fill(str(opacity))
        seen = np.array(Image.open(BytesIO(stage.screenshot())).convert("RGB")).astype(int)
        expected = heat(explanation.picture, values, opacity).astype(int).repeat(6, 0).repeat(6, 1)
        assert np.abs(seen - expected).max() <= 2
    stage.click(position={"x": 60, "y": 48})  # the first pixels of row 1, column 1
    expect(tab.locator("#relevance .readout")).to_contain_text("Patch in row 1, column 1: 0")
    tab.keyboard.press("ArrowRight")
    expect(tab.locator("#relevance .readout")).to_contain_text("Patch in row 1, column 2: +0.5")


def test_a_patch_shows_where_it_looks(opened: Open):
    explanation = made.seen()
    tab = opened(page(explanation))
    tab.get_by_role("button", name="layer 1, head 3", exact=True).click()
    card = detail(tab)
    expect(card.locator("h3")).to_have_text("Layer 1, head 3")
    card.locator(".stage").focus()
    tab.keyboard.press("ArrowDown")  # from the first patch to the one below
    weights = explanation.attention[0].weights[1, 3, 7].astype(float)
    best = explanation.sequences[0].units[weights.argmax()].split(",")
    expect(card.locator(".readout")).to_contain_text(
        f"Patch in row 1, column 0 looks at patch in row {best[0]}, column {best[1]} {percent(weights.max())}"
        if len(best) == 2
        else f"looks at the class token {percent(weights.max())}"
    )


def test_a_pair_shows_what_each_text_took_from_the_other(opened: Open):
    explanation = made.pair()
    tab = opened(page(explanation))
    matrix = explanation.choices[0].relevances[0].matrix["encoder"]
    card = tab.locator("article", has_text="Across the two texts")
    card.locator("canvas").first.focus()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowDown")
    said = card.locator(".readout").first
    expect(said).to_contain_text("“dogs” took")
    expect(said).to_contain_text("from “are”")
    shown = float(re.search(r"took \+?([\d.e-]+)", said.text_content())[1])
    assert shown == pytest.approx(matrix[2, 10], abs=ROUNDED)


def test_a_translation_shows_its_alignment(opened: Open):
    explanation = made.translated()
    tab = opened(page(explanation))
    expect(tab.locator("#alignment code")).to_have_text("0-0 1-1 3-2 4-3 5-4 6-5")
    tab.locator("#alignment canvas").focus()
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowRight")
    expect(tab.locator("#alignment .readout")).to_have_text(
        f"“Hunde” comes from “dogs” with {percent(explanation.alignment.matrix[1, 1])}."
    )


def test_long_inputs_stay_small_and_say_what_is_left_out(opened: Open):
    """512 tokens, 12 x 12 heads."""
    explanation = made.long()
    html = page(explanation)
    assert BUDGET / 4 < len(html.encode()) < 5_000_000
    tab = opened(html)
    expect(tab.get_by_role("group", name="all heads").get_by_role("button")).to_have_count(144)
    card = detail(tab)
    least = (
        float(
            re.search(
                r"Weights under ([\d.]+) % are not shown", tab.locator("#attention .lead").text_content()
            )[1]
        )
        / 100
    )
    tab.get_by_role("button", name="layer 3, head 7", exact=True).click()
    expect(card.locator("h3")).to_have_text("Layer 3, head 7")
    card.locator(".unit").nth(100).click()
    truth = explanation.attention[0].weights[3, 7, 100].astype(float)
    shown = np.array(weights_of(card.locator(".unit")))
    assert shown == pytest.approx(np.where(truth >= least, truth, 0), abs=ROUNDED)
    hidden = re.search(
        r"([\d.]+) % of its attention is on weights under", card.locator(".readout").text_content()
    )
    assert float(hidden[1]) / 100 == pytest.approx(truth[truth < least].sum(), abs=0.03)


def test_the_page_is_as_light_as_its_surroundings(opened: Open):
    tab = opened(page(made.sentence()))
    detail(tab)

    def brightness() -> list[int]:
        """Of the ground and of the ink on it."""
        return [
            sum(tab.evaluate(f"getComputedStyle(document.body).{name}.match(/\\d+/g).map(Number)"))
            for name in ("backgroundColor", "color")
        ]

    ground, ink = brightness()
    assert ground > 600 > 200 > ink
    tab.emulate_media(color_scheme="dark")
    ground, ink = brightness()
    assert ground < 200 < 600 < ink


def test_what_is_drawn_changes_with_the_colours(opened: Open):
    tab = opened(page(made.sentence()))
    grid = tab.get_by_role("group", name="all heads")
    before = grid.locator("canvas").first.element_handle()
    tab.emulate_media(color_scheme="dark")
    before.wait_for_element_state("hidden")  # it has been drawn anew
    expect(grid).to_have_attribute("aria-busy", "false")
    pixel = "one => Array.from(one.getContext('2d').getImageData(0, 0, 1, 1).data)"
    *drawn, opacity = grid.locator("canvas").first.evaluate(pixel)
    assert drawn == pytest.approx([144, 168, 255], abs=2) and opacity > 100  # --accent of the dark


def test_whatever_a_token_is_it_is_shown_and_never_run(opened: Open):
    units = ("[CLS]", made.NASTY, " \u202eevil", " שלום", " 🙂", "\n", "", " a\u200bb", "[SEP]")
    tab = opened(page(made.classified(*units, model=made.NASTY)))
    detail(tab)
    assert tab.title() == "Why “positive”?"
    assert tab.locator("img").count() == 0 and tab.locator("script").count() == 2
    expect(tab.locator("#relevance .unit")).to_have_text(
        ["[CLS]", made.NASTY.strip(), "⟨202e⟩evil", "שלום", "🙂", "↵", "∅", "a⟨200b⟩b", "[SEP]"]
    )
    tab.locator("#relevance .unit").nth(3).hover()  # isolated, so that the number stays behind it
    expect(tab.locator("#relevance .readout")).to_contain_text("“\u2068שלום\u2069”: ")


def test_the_page_may_run_nothing_else_and_load_nothing(browser: Browser, tmp_path: Path):
    """The content security policy holds, should ever something get past the escaping."""
    file = tmp_path / "page.html"
    file.write_text(page(made.sentence()), encoding="utf-8")
    tab = browser.new_page()
    tab.goto(file.as_uri())
    tab.evaluate(
        "const script = document.createElement('script'); script.textContent = 'window.ran = true';"
        "document.body.append(script)"
    )
    assert tab.evaluate("window.ran === undefined")
    assert tab.evaluate("fetch('data:,a').then(() => 'loaded', () => 'refused')") == "refused"
    tab.close()


def test_two_explanations_are_compared(opened: Open):
    before, after = made.sentence(), made.sentence(model="runs/tuned", seed=1)
    tab = opened(compare_page(before, after))
    expect(tab.get_by_role("group", name="all heads")).to_have_count(2)
    expect(tab.locator("#relevance .which")).to_have_text(["1. runs/reviews", "2. runs/tuned"])
    tab.get_by_role("button", name="layer 1, head 2", exact=True).last.click()
    expect(detail(tab).locator("h3")).to_have_text(["Layer 1, head 2"] * 2)  # both go along
    old, new = (one.choices[0].relevances[0].values["text"] for one in (before, after))
    change = tab.get_by_role("group", name="text: change of relevance").locator(".unit")
    shown = change.evaluate_all("all => all.map(one => Number(one.dataset.value))")
    expected = new / np.abs(new[1:-1]).sum() - old / np.abs(old[1:-1]).sum()
    assert shown == pytest.approx([0, *expected[1:-1], 0], abs=1e-6)  # markers are not counted


def test_of_two_inputs_common_tokens_are_compared(opened: Open):
    before, after = (
        made.classified("[CLS]", "a", " film", "[SEP]"),
        made.classified("[CLS]", "a", " dull", " film", "[SEP]"),
    )
    tab = opened(compare_page(before, after))
    expect(tab.locator("#relevance .which")).to_have_text(["1. a film", "2. a dull film"])
    expect(tab.locator(".unit.new")).to_have_text(["dull"])
    old, new = (one.choices[0].relevances[0].values["text"] for one in (before, after))
    change = tab.get_by_role("group", name="text: change of relevance").locator(".unit").nth(3)
    expected = new[3] / np.abs(new[1:-1]).sum() - old[2] / np.abs(old[1:-1]).sum()
    assert float(change.get_attribute("data-value")) == pytest.approx(expected, abs=1e-6)


def test_a_notebook_shows_several(opened: Open):
    tab = opened(
        f"<!doctype html><title>notebook</title>{frame(made.sentence())}{made.generated()._repr_html_()}"
    )
    for number in (0, 1):
        inner = tab.frame_locator("iframe").nth(number)
        tab.locator("iframe").nth(number).scroll_into_view_if_needed()
        expect(inner.get_by_role("group", name="all heads").get_by_role("button")).to_have_count(12)
        expect(inner.locator("h3", has_text=re.compile("^Layer"))).to_be_visible()
