"""Metrics against scikit-learn, and evaluation against a plain loop."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, matthews_corrcoef

from qkv.evaluate import macro_f1, matthews, translation_scores

pairs = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60)


@given(pairs)
def test_matthews_is_scikit_learn_s(items):
    labels, predictions = zip(*items, strict=True)
    assert matthews(Counter(items)) == pytest.approx(matthews_corrcoef(labels, predictions), abs=1e-9)


@given(pairs)
def test_macro_f1_is_scikit_learn_s(items):
    labels, predictions = zip(*items, strict=True)
    expected = f1_score(labels, predictions, average="macro", zero_division=0)
    assert macro_f1(Counter(items)) == pytest.approx(expected, abs=1e-9)


def test_translation_scores_of_a_perfect_and_a_wrong_answer():
    text = ["ein Hund läuft über die grüne Wiese", "zwei Männer sitzen auf einer Bank"]
    right = translation_scores(text, text)
    assert right["bleu"] == pytest.approx(100.0)
    assert "tok:13a" in str(right["bleu_signature"])
    assert float(translation_scores(text[::-1], text)["bleu"]) < 5.0
