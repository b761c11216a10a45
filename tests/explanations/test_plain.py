"""JSON holds all of an explanation, and gives it back to the bit."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest

from explanations import made
from qkv.errors import InputError
from qkv.explanations.plain import from_json, to_json

ALL = [made.sentence, made.pair, made.generated, made.translated, made.seen]


def assert_same(one, other) -> None:
    """Of one type and equal to the bit, all the way down."""
    assert type(one) is type(other)
    if isinstance(one, np.ndarray):
        assert one.dtype == other.dtype and np.array_equal(one, other)
    elif is_dataclass(one):
        for field in fields(one):
            assert_same(getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


@pytest.mark.parametrize("make", ALL)
def test_what_comes_back_is_what_went(make):
    explanation = make()
    assert_same(from_json(to_json(explanation)), explanation)


def test_programs_find_the_documented_fields():
    explanation = made.sentence()
    values = json.loads(to_json(explanation))
    assert values["family"] == "bert" and values["sequences"][0]["units"][4] == " fine"
    choice = values["choices"][0]
    assert choice["alternatives"][1] == explanation.choices[0].alternatives[1]._asdict()
    weights = np.array(values["attention"][0]["weights"])
    assert np.array_equal(weights.astype(np.float16), explanation.attention[0].weights)


def test_numbers_have_no_more_digits_than_they_need():
    explanation = replace(made.sentence(), residual=0.1)
    weights = json.loads(to_json(explanation))["attention"][0]["weights"]
    assert max(len(str(x)) for x in np.ravel(weights)) <= 10


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda v: v["choices"][0].update(answer=3), r"choices\[0\].answer should be str"),
        (lambda v: v.update(family="rnn"), "family should be one of transformer, bert, gpt, vit"),
        (lambda v: v.pop("residual"), "it should be an object of family, model"),
        (lambda v: v["choices"][0]["alternatives"].append(None), r"alternatives\[3\] should be an object"),
        (
            lambda v: v["attention"][0].update(weights=[[1], [1, 2]]),
            r"attention\[0\].weights should be lists",
        ),
        (lambda v: v["attention"][0].update(weights=["a"]), r"attention\[0\].weights should be lists"),
        (lambda v: v["sequences"][0].update(units="a"), r"sequences\[0\].units should be a list"),
    ],
)
def test_what_is_no_explanation_is_refused_by_name(break_it, said: str):
    values = json.loads(to_json(made.sentence()))
    break_it(values)
    with pytest.raises(InputError, match=said):
        from_json(json.dumps(values))


def test_what_is_no_json_is_refused():
    with pytest.raises(InputError, match="not an explanation in JSON"):
        from_json("{")
