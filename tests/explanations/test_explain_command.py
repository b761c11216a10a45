"""`qkv explain`: what it asks for, and what it prints and writes, with explanations made by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console
from test_cli import fail, succeed
from test_pipelines import tokenizer

import qkv
from explanations import made
from qkv.errors import InputError
from qkv.explanations import units
from qkv.explanations.explainer import METHODS, RANDOM_ORDERS
from qkv.explanations.explanation import Explanation
from qkv.explanations.plain import to_json
from qkv.explanations.summary import summary
from qkv.explanations.words import answered
from qkv.explanations.words import asked as asked_about


def shown(explanation: Explanation) -> list[str]:
    """The lines of a summary."""
    console = Console(width=80, record=True, file=StringIO())
    console.print(*summary(explanation))
    return console.export_text().splitlines()


@pytest.fixture
def asked(monkeypatch) -> list[tuple]:
    """What is asked of `explain`, which answers by hand."""
    asked = []

    def explain(model, given, target=None, **options):
        if model == "missing":
            raise InputError("missing is neither a folder nor on the hub")
        options.pop("watch")("choices explained", 0, 1)
        asked.append((model, given, target, options))
        return made.generated() if model == "gpt" else made.sentence(model=model)

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(qkv, "explain", explain)
    return asked


def test_a_terminal_gets_a_summary(asked):
    said = " ".join(succeed("explain", "bert", "a film").split())
    assert "and answered “positive”, 82 % sure." in said
    assert "Instead: negative 8.1 % · neutral 4.1 %" in said
    for relevance in made.sentence().choices[0].relevances:
        found = relevance.faithfulness
        assert f"{found.beats_random}, {found.beaten} of 6" in said or found.beats_random == "worse"
    wanted = {"max_new_tokens": 16, "seed": 0, "methods": METHODS, "random_orders": RANDOM_ORDERS}
    assert asked == [("bert", "a film", None, wanted)]


def test_a_summary_names_the_words_of_tags_and_the_texts_of_pairs():
    lines = [line.split() for line in shown(made.tagged())]
    for word, tag in (("Anna", "B-PER"), ("York", "I-LOC")):
        assert any(line[:2] == [word, tag] for line in lines)
    whole = made.pair()
    first = replace(whole.choices[0], answer="similarity", outcome="value", probability=0.25)
    second = replace(first, unit=len(whole.sequences[0].units) - 1)
    lines = [line.split()[:4] for line in shown(replace(whole, choices=(first, second)))]
    for number in ("first", "second"):
        assert [number, "text", "similarity", "0.25"] in lines


def test_what_was_asked_about_is_not_called_the_answer():
    whole = made.sentence()
    first = whole.choices[0]
    other = replace(first, answer="negative", probability=0.081)
    assert "answered “positive”, 82 % sure." in asked_about(replace(whole, target="positive"))
    said = asked_about(replace(whole, choices=(other,), target="negative"))
    assert "was asked about “negative”, which it finds 8.1 % probable; likeliest is “positive”, 82 %." in said
    text = made.generated()
    odd = replace(text.choices[1], answer="!")
    said = asked_about(replace(text, choices=(text.choices[0], odd), target="\n!"))
    assert said.endswith("and was asked about “!”.")
    value = replace(first, answer="stars", probability=4.25, outcome="value")
    assert asked_about(replace(whole, choices=(value,))).endswith("”: stars 4.25.")


def test_letters_of_several_tokens_are_whole_in_an_answer():
    bytes_of = tokenizer("gpt", "bpe", 300)
    ids = bytes_of.plain("a ’🙂 b")
    read = units.of_ids("text", bytes_of, ids[:-1], [False] * (len(ids) - 1))
    step = made.generated().choices[0]
    choices = tuple(replace(step, answer=units.written(bytes_of, id), unit=i) for i, id in enumerate(ids[1:]))
    whole = replace(made.generated(), sequences=(read,), choices=choices)
    assert answered(whole) == bytes_of.decode(ids[1:]).strip()
    assert answered(replace(whole, target=" ’🙂 b")) == "’🙂 b"


def test_the_likeliest_of_labels_is_no_answer():
    whole = made.sentence()
    label = replace(whole.choices[0], answer="toxic", probability=0.03, outcome="label")
    assert asked_about(replace(whole, choices=(label,))).endswith("finds “toxic” likeliest, 3.0 % probable.")


def test_nothing_is_said_to_matter_where_nothing_else_was_read():
    whole = made.generated()
    first = whole.sequences[0]
    alone = replace(first, units=first.units[:1], special=(False,), words=first.words[:1])
    one = whole.choices[0].relevances[0]
    relevance = replace(one, values={alone.name: one.values[alone.name][:1]})
    choice = replace(whole.choices[0], unit=0, relevances=(relevance,))
    lines = shown(replace(whole, sequences=(alone,), choices=(choice,)))
    assert any("nothing else was read" in line for line in lines)


def test_each_step_of_a_text_is_a_line(asked):
    said = succeed("explain", "gpt", "def")
    steps = [line for line in said.splitlines() if " % · None" in line]
    assert len(steps) == len(made.generated().choices)


def test_options_are_handed_on(asked):
    options = ["--target=negative", "--methods", "rollout", "attention", "--max-new-tokens=3", "--seed=7"]
    succeed("explain", "bert", "a film", "a play", *options)
    methods = ("rollout", "attention")
    wanted = {"max_new_tokens": 3, "seed": 7, "methods": methods, "random_orders": RANDOM_ORDERS}
    assert asked == [("bert", ("a film", "a play"), "negative", wanted)]


def test_json_is_a_line_an_explanation(asked):
    lines = succeed("explain", "bert", "a film", "--compare", "tuned", "--json").splitlines()
    assert lines == [to_json(made.sentence(model=model)) for model in ("bert", "tuned")]


def test_a_file_is_written_and_named(asked, tmp_path):
    for name in ("a.html", "a.svg", "a.png", "a.json"):
        file = tmp_path / name
        assert json.loads(succeed("explain", "bert", "a", "-o", file)) == {"file": str(file)}
    succeed("explain", "bert", "a", "-o", tmp_path / "head.svg", "--figure", "attention", "--layer", "2")
    assert (tmp_path / "head.svg").read_text() != (tmp_path / "a.svg").read_text()


def test_a_figure_takes_no_more_work_than_it_shows(asked, tmp_path):
    ways = {(): ("relevance",), ("--map", "rollout"): ("rollout",), ("--figure", "attention"): ()}
    for options, methods in ways.items():
        succeed("explain", "bert", "a", "-o", tmp_path / "a.svg", *options)
        *_, given = asked.pop()
        assert (given["methods"], given["random_orders"]) == (methods, 0)
    assert "by --map" in fail("explain", "bert", "a", "-o", tmp_path / "b.svg", "--methods", "rollout")
    for options, said in (
        (("--layer", "2"), "--layer is of a figure of attention: add --figure attention"),
        (("--figure", "attention", "--map", "rollout"), "--map is of a figure of relevance"),
        (("--figure", "alignment", "--choice", "1"), "--choice is of a figure of relevance"),
    ):
        assert f"qkv: {said}" in fail("explain", "bert", "a", "-o", tmp_path / "b.svg", *options)
    assert asked == []


def test_two_inputs_or_two_models_are_compared(asked, tmp_path):
    succeed("explain", "bert", "a", "--compare-input", "b", "-o", tmp_path / "inputs.html")
    succeed("explain", "bert", "a", "--compare", "tuned", "-o", tmp_path / "models.html")
    succeed("explain", "bert", "a", "--compare-input", "", "-o", tmp_path / "nothing.html")
    inputs, models = [("bert", "a"), ("bert", "b")], [("bert", "a"), ("tuned", "a")]
    nothing = [("bert", "a"), ("bert", "")]
    assert [(model, given) for model, given, *_ in asked] == inputs + models + nothing


def test_mistakes_are_a_line_and_found_before_any_work(asked, tmp_path):
    assert "saved as .html" in fail("explain", "bert", "a", "-o", tmp_path / "a.pdf")
    assert "side by side" in fail("explain", "bert", "a", "--compare", "b", "-o", tmp_path / "a.png")
    assert "not both" in fail("explain", "bert", "a", "--compare", "b", "--compare-input", "c")
    assert "leave out the second text" in fail("explain", "bert", "a", "b", "--compare-input", "c")
    assert "leave one out" in fail("explain", "bert", "a", "--json", "-o", tmp_path / "a.html")
    (tmp_path / "b.html").mkdir()
    assert "it is a folder" in fail("explain", "bert", "a", "-o", tmp_path / "b.html")
    (tmp_path / "b.html").rmdir()
    (tmp_path / "c").touch()
    assert "c forbids it" in fail("explain", "bert", "a", "-o", tmp_path / "c" / "a.html")
    (tmp_path / "c").unlink()
    for file in ([], ["-o", tmp_path / "a.html"]):
        assert "give -o FILE with .png or .svg" in fail("explain", "bert", "a", "--map", "flow", *file)
    assert "invalid choice" in fail("explain", "bert", "a", "--methods", "guessing")
    assert asked == []
    assert "neither a folder nor on the hub" in fail("explain", "missing", "a")
    figure = ["-o", tmp_path / "a.svg", "--figure", "attention", "--head", "9"]
    assert "no head 9" in fail("explain", "bert", "a", *figure)
    assert list(tmp_path.iterdir()) == []
