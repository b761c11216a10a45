"""Deletion and insertion curves, their verdicts, and occlusion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from explanations.subjects import ALONE, CASES, subject
from qkv.explanations import subjects
from qkv.explanations.explanation import Faithfulness, Relevance, Units
from qkv.explanations.faithfulness import faithfulness, occlusion
from qkv.explanations.subjects import Question, Reading, Subject


class Planted(Subject):
    """No model: the first of two classes gains the weight of each unit that is there."""

    family = "bert"

    def __init__(self, weights: list[float]) -> None:
        self.weights = torch.tensor(weights, dtype=torch.float32)
        names = tuple(map(str, range(len(weights))))
        ones, zeros = torch.ones(len(weights), 1), torch.zeros(len(weights), 1)
        sequence = Units("text", names, (False,) * len(weights))
        super().__init__([sequence], {}, ones, zeros, Reading(self.read, 2, str))
        self.ask([self.question("text", 0)], [0])

    def states(self, x: Tensor) -> Iterator[Tensor]:
        yield x

    def read(self, state: Tensor, questions: Sequence[Question]) -> Tensor:
        logits = state[..., 0] @ self.weights  # (N,)
        return torch.stack([logits, torch.zeros_like(logits)], dim=-1)[:, None].expand(-1, len(questions), 2)


def curves(one: Subject, values: list[float] | np.ndarray, orders: int = 10, seed: int = 0) -> Faithfulness:
    relevance = Relevance("attention", {"text": np.array(values, dtype=np.float32)})
    (found,) = faithfulness(one, one.questions[0], [relevance], orders, seed)
    assert found.faithfulness is not None
    return found.faithfulness


def test_a_map_that_finds_the_one_unit_that_decides_is_perfect():
    one = Planted([0, 0, 0, 20, 0, 0, 0, 0])
    found = curves(one, [0, 0, 0, 1, 0, 0, 0, 0])
    np.testing.assert_allclose(found.shares, np.arange(9) / 8)
    np.testing.assert_allclose(found.deletion, [1] + [0.5] * 8, atol=1e-6)
    np.testing.assert_allclose(found.insertion, [0.5] + [1] * 8, atol=1e-6)
    assert found.deletion_area == pytest.approx(0.5 + 0.5 / 16)
    assert found.insertion_area == pytest.approx(1 - 0.5 / 16)
    worst = curves(one, [1, 1, 1, 0, 1, 1, 1, 1])
    assert worst.beaten == 0
    assert found.beaten > 5


def test_a_map_that_ranks_all_units_rightly_beats_every_random_order():
    weights = [3.0, -1.0, 0.5, -2.0, 1.0, 0.1, -0.4, 2.0, -3.0, 0.7, 0.2, -0.3]
    one = Planted(weights)
    assert curves(one, weights).verdict == "better than all 10 random orders"
    assert curves(one, -np.array(weights)).verdict == "worse than all 10 random orders on this input"
    assert curves(Planted([0.0] * 12), weights).verdict.startswith("no better than random on this input")
    assert curves(Planted([1.0]), [1.0]).verdict == "too few units to tell"


@given(st.integers(0, 200))
def test_a_random_map_is_seldom_said_to_be_better(seed: int):
    """Of eleven random maps one beats ten others by chance, and so many may pass."""
    rng = np.random.default_rng(seed)
    one = Planted(list(rng.normal(size=15)))
    passed = [curves(one, rng.normal(size=15), seed=i).verdict.startswith("better") for i in range(30)]
    assert sum(passed) <= 12


@pytest.mark.parametrize("name", CASES)
def test_curves_begin_and_end_with_the_input_and_its_baseline(name: str):
    one = subject(name)
    for question in one.questions[:2]:
        units = {s.name: np.arange(len(s.units), dtype=np.float32) for s in one.sequences}
        (relevance,) = faithfulness(one, question, [Relevance("attention", units)], 3, 0)
        found = relevance.faithfulness
        with torch.no_grad():
            gone = one.free(question)[None] & torch.tensor([[False], [True]])
            outputs = one.outputs(one.without(gone), [question])[:, 0]
        here, nothing = one.probabilities(outputs)[:, question.answer].tolist()
        for deletion, insertion in [
            (found.deletion, found.insertion),
            *zip(found.random_deletion, found.random_insertion, strict=True),
        ]:
            np.testing.assert_allclose([deletion[0], insertion[-1]], here, rtol=1e-5)
            np.testing.assert_allclose([deletion[-1], insertion[0]], nothing, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_what_is_computed_together_does_not_matter(name: str, monkeypatch):
    one = subject(name)
    question = one.questions[-1]
    maps = [Relevance("attention", {s.name: np.zeros(len(s.units), np.float32) for s in one.sequences})]
    together = faithfulness(one, question, maps, 4, 7)[0].faithfulness
    monkeypatch.setattr(subjects, "TOKENS", 1)
    alone = faithfulness(one, question, maps, 4, 7)[0].faithfulness
    np.testing.assert_allclose(alone.random_deletion, together.random_deletion, rtol=1e-6)
    other = faithfulness(one, question, maps, 4, 8)[0].faithfulness
    assert not np.array_equal(other.random_deletion, together.random_deletion)


@pytest.mark.parametrize("name", CASES)
def test_occlusion_takes_one_unit_away_at_a_time(name: str):
    one = subject(name)
    question = one.questions[0]
    found = occlusion(one, question)
    with torch.no_grad():
        for unit, free in enumerate(one.free(question)):
            x = one.embedded[None].clone()
            x[0, unit] = one.baseline[unit]
            scores = [
                one.score(one.outputs(y, [question])[0, 0], question.answer) for y in (one.embedded[None], x)
            ]
            expected = scores[0] - scores[1] if free else torch.tensor(0.0)
            torch.testing.assert_close(found[unit], expected.to(found))


@pytest.mark.parametrize("name", ALONE)
def test_markers_stay_and_what_is_no_candidate_cannot_matter(name: str):
    one = subject(name)
    special = torch.tensor([marker for s in one.sequences for marker in s.special])
    assert (one.embedded == one.baseline).all(-1)[special].all()
    for question in one.questions:
        hidden = ~question.candidates
        x = torch.where(hidden[:, None], torch.randn_like(one.embedded), one.embedded)
        with torch.no_grad():
            ours, theirs = one.outputs(torch.stack([one.embedded, x]), [question])
        torch.testing.assert_close(ours, theirs)
