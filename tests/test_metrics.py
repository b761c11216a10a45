"""Metrics against scikit-learn, scipy, seqeval and sacreBLEU."""

import math
import warnings
from collections import Counter

import numpy as np
import pytest
import scipy.stats
import seqeval.metrics
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import f1_score, matthews_corrcoef

from qkv.metrics import (
    alignment_error_rate,
    entities,
    entity_scores,
    f1,
    is_bio,
    label_scores,
    macro_f1,
    matthews,
    pearson,
    spearman,
    translation_scores,
)

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


def test_tokenised_text_is_scored_as_it_is():
    said, meant = ["a man 's dog runs ( fast ) ."], ["a man 's dog runs (fast)."]
    assert translation_scores(said, meant)["bleu"] == pytest.approx(100.0)  # 13a takes punctuation off words
    found = translation_scores(said, meant, tokenize="none")
    assert "tok:none" in str(found["bleu_signature"])
    # Shared n-grams of 1 to 4 words, out of those of nine: a man 's dog runs.
    matches = (5 / 9, 4 / 8, 3 / 7, 2 / 6)
    assert found["bleu"] == pytest.approx(100 * math.prod(matches) ** (1 / 4))


# ---------------------------------------------------------------- independent labels

choices = st.tuples(st.integers(1, 12), st.integers(2, 4)).flatmap(
    lambda shape: st.tuples(arrays(bool, shape), arrays(bool, shape))
)


@given(choices)
def test_label_scores_are_scikit_learn_s(answers):
    labels, predictions = answers
    found = label_scores(labels, predictions)
    for average, zero in (("micro", 0.0), ("macro", np.nan)):  # NaN: labels that never occur do not count
        expected = f1_score(labels.astype(int), predictions.astype(int), average=average, zero_division=zero)
        assert found[f"{average}_f1"] == pytest.approx(np.nan_to_num(expected))
    assert found["exact_match"] == pytest.approx(np.mean([all(row) for row in labels == predictions]))


# ---------------------------------------------------------------- values

values = st.lists(st.tuples(st.integers(-9, 9), st.floats(-9, 9, width=16)), min_size=2, max_size=30)


@given(values)
def test_correlations_are_scipy_s(items):
    one, other = (np.array(column, dtype=np.float32) for column in zip(*items, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy has no answer for constants: we say 0
        expected = scipy.stats.pearsonr(one.astype(float), other.astype(float)).statistic
        ranked = scipy.stats.spearmanr(one, other).statistic
    assert pearson(one, other) == pytest.approx(np.nan_to_num(expected), abs=1e-7)
    assert spearman(one, other) == pytest.approx(np.nan_to_num(ranked), abs=1e-7)


# ---------------------------------------------------------------- entities

tags = st.sampled_from(["O", "B-A", "I-A", "B-B", "I-B"])
tagged = st.lists(
    st.integers(1, 7).flatmap(
        lambda n: st.tuples(st.lists(tags, min_size=n, max_size=n), st.lists(tags, min_size=n, max_size=n))
    ),
    min_size=1,
    max_size=6,
)


@given(tagged)
def test_entity_scores_are_seqeval_s(sentences):
    labels, predictions = (list(column) for column in zip(*sentences, strict=True))
    found = entity_scores(labels, predictions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns where nothing is divided by
        for name in ("precision", "recall", "f1"):
            expected = getattr(seqeval.metrics, f"{name}_score")(labels, predictions)
            assert found[name] == pytest.approx(float(expected))


def test_entities_by_hand():
    sentence = ["I-A", "I-A", "B-A", "O", "B-B", "I-A", "I-A"]
    assert list(entities(sentence)) == [(0, 2, "A"), (2, 3, "A"), (4, 5, "B"), (5, 7, "A")]
    assert is_bio(("O", "B-A", "I-A")) and is_bio(("I-A",))
    assert not is_bio(("NOUN", "O")) and not is_bio(("O",)) and not is_bio(("B-A", "S-A"))


links = st.sets(st.tuples(st.integers(0, 3), st.integers(0, 3)))


@given(st.lists(st.tuples(links, links), max_size=4))
def test_an_alignment_error_rate_of_sure_links_is_one_less_f1(pairs):
    found, gold = [a for a, _ in pairs], [b for _, b in pairs]
    shared, said = (sum(map(len, sets)) for sets in ([a & b for a, b in pairs], found))
    true = sum(map(len, gold))
    expected = 1 - f1(shared, said, true) if said + true else 0.0
    assert alignment_error_rate(found, gold) == pytest.approx(expected)
