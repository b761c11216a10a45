"""Alignments from planted cross-attention, their error rate, and dates of which the alignment is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_pipelines import translator

from explanations.subjects import CASES, subject
from qkv.demo.transformer import aligned_dates
from qkv.explanations.alignment import align, align_texts, information
from qkv.explanations.attention_flow import Look, looks
from qkv.explanations.explanation import Units
from qkv.explanations.inputs import subject_of
from qkv.explanations.subjects import Subject


class Sentences:
    """All that an alignment asks of a subject: two source words of two tokens each, three target words."""

    embedded = torch.zeros(1)
    sequences = (
        Units("source", ("a", "b", "c", "d", "</s>"), (False,) * 4 + (True,), words=(0, 0, 1, 1, -1)),
        Units("target", ("<pad>", "x", "y", "y", "z"), (True,) + (False,) * 4, words=(-1, 0, 1, 1, 2)),
    )


GOLD = ((0, 1), (1, 0), (1, 2))
"""x is c d, y is a b, and z is c d again."""


def planted(row_of_token: int) -> torch.Tensor:
    """A head whose rows look at each target token's source, from its own row or from the one before."""
    weights = torch.full((5, 5), 0.02)
    for token, source in ((1, 2), (2, 0), (3, 1), (4, 3)):
        weights[token + row_of_token, source] = 1.0
    return weights / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("row", [0, -1])
def test_the_head_that_aligns_is_found_and_the_rows_it_does_it_in(row: int):
    same = torch.zeros(5, 5)
    same[:, 4] = 1.0  # always looks at the end
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(5, 5, generator=generator).softmax(-1)
    first, second = torch.stack([same, noise]), torch.stack([noise, planted(row)])
    source, target = slice(0, 5), slice(5, 10)
    seen = [Look("cross", i, target, source, weights) for i, weights in enumerate((first, second))]
    found = align(Sentences(), seen)  # type: ignore[arg-type]
    assert found.heads == ((1, 1),)
    assert found.links == GOLD
    assert found.pharaoh == "0-1 1-0 1-2"
    np.testing.assert_allclose(found.matrix.sum(-1), 1, rtol=1e-5)


def test_information_is_that_of_two_variables():
    assert information(torch.eye(4).clamp(min=1e-12)) == pytest.approx(np.log(4))
    assert information(torch.full((4, 3), 1 / 3)) == pytest.approx(0, abs=1e-6)
    joint = np.array([[0.3, 0.2], [0.1, 0.4]])  # both rows weigh the same
    p = joint.sum(0)
    expected = (joint * np.log(joint / (0.5 * p))).sum()
    assert information(torch.tensor(joint * 2)) == pytest.approx(expected)


def test_a_translation_without_words_has_no_alignment():
    pipeline, _, _ = CASES["transformer"]()
    one: Subject = subject_of(pipeline, "", "Two dogs", 1)
    assert align(one, looks(one)[0]) is None


def test_a_word_that_no_token_is_of_has_no_link():
    """WordPiece leaves out what nobody sees."""
    found = align_texts(translator("wordpiece"), "Two dogs run.", "Zwei \N{ZERO WIDTH SPACE} Hunde")
    assert [i for _, i in sorted(found.links, key=lambda link: link[1])] == [0, 2]


def test_one_word_for_many_is_no_alignment():
    """As a script without spaces has: no head can tell anything of it."""
    pipeline, given, _ = CASES["transformer"]()
    assert align_texts(pipeline, given, "Zweihunde") is None
    assert align_texts(pipeline, "Two", "Zweihunde").links == ((0, 0),)


def test_an_alignment_is_the_same_with_all_else_explained():
    pipeline, given, target = CASES["transformer"]()
    one = subject("transformer", torch.float32)
    found, alone = align(one, looks(one)[0]), align_texts(pipeline, given, target)
    assert found.links == alone.links
    words = [len(text.split()) for text in (target, given)]
    assert list(found.matrix.shape) == words
    assert [link[1] for link in sorted(found.links, key=lambda link: link[1])] == list(range(words[0]))


def test_known_alignments_link_words_of_the_same_value():
    for english, hungarian, links in aligned_dates(20):
        sources, targets = english.split(), hungarian.split()
        for word, other in links[2:]:  # day and year are written in figures
            assert sources[word].strip(",.") == targets[other].strip(",.")
        assert len(links) == len(sources) == len(targets) == 4
