"""Losses beside torch's own, and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from qkv import objectives
from qkv.data.batches import ContrastiveBatch
from qkv.objectives import BinaryCrossEntropy, CrossEntropy, SquaredError, contrastive
from qkv.ragged import pack


@given(st.integers(1, 40), st.integers(2, 30), st.sampled_from([0.0, 0.1, 0.5]), st.integers(1, 200))
def test_cross_entropy_is_torch_s(rows, classes, smoothing, elements):
    generator = torch.Generator().manual_seed(rows * classes)
    logits = 3 * torch.randn(rows, classes, generator=generator)
    labels = torch.randint(classes, (rows,), generator=generator)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objectives, "_CPU_ELEMENTS", elements)  # in pieces of any size
        loss = CrossEntropy(ours, labels).loss_sum(smoothing)
    expected = F.cross_entropy(theirs, labels, reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected)
    (2.5 * loss).backward()
    (2.5 * expected).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-5)


@given(st.integers(1, 40), st.integers(2, 30), st.integers(1, 200))
def test_divergence_is_torch_s(rows, classes, elements):
    generator = torch.Generator().manual_seed(rows * classes)
    a, b = (3 * torch.randn(rows, classes, generator=generator) for _ in range(2))
    ours, theirs = ([x.clone().requires_grad_() for x in (a, b)] for _ in range(2))
    labels = torch.zeros(rows, dtype=torch.long)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objectives, "_CPU_ELEMENTS", elements)
        one, other = (CrossEntropy(logits, labels) for logits in ours)
        found = one.divergence_sum(other)
    p, q = (logits.log_softmax(-1) for logits in theirs)
    kl = F.kl_div(q, p, log_target=True, reduction="sum") + F.kl_div(p, q, log_target=True, reduction="sum")
    torch.testing.assert_close(found, kl, atol=1e-4, rtol=1e-4)
    (2.5 * found).backward()
    (2.5 * kl).backward()
    for mine, other_s in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other_s.grad, atol=1e-4, rtol=1e-4)


def test_cross_entropy_in_bfloat16_keeps_the_loss_in_float32():
    logits = torch.randn(64, 500).bfloat16().requires_grad_()
    labels = torch.randint(500, (64,))
    loss = CrossEntropy(logits, labels).loss_sum()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), labels, reduction="sum"))
    loss.backward()
    exact = logits.detach().float().softmax(-1) - F.one_hot(labels, 500)
    torch.testing.assert_close(logits.grad.float(), exact, atol=1e-2, rtol=1e-2)


def test_a_hopeless_label_costs_much_and_not_infinitely_much():
    logits = torch.tensor([[0.0, 200.0]], requires_grad=True)
    loss = CrossEntropy(logits, torch.tensor([0])).loss_sum()
    loss.backward()
    assert loss.item() == 200.0 and logits.grad.tolist() == [[-1.0, 1.0]]


def test_without_gradients_there_is_only_the_loss():
    logits = torch.randn(5, 7)
    with torch.no_grad():
        loss = CrossEntropy(logits, torch.zeros(5, dtype=torch.long)).loss_sum()
    assert not loss.requires_grad


@given(st.integers(1, 6), st.integers(1, 5), st.sampled_from([0.0, 0.2]))
def test_binary_cross_entropy_by_hand(texts, labels, smoothing):
    rng = np.random.default_rng(texts * labels)
    logits, right = rng.normal(scale=3, size=(texts, labels)), rng.random((texts, labels)) < 0.4
    p = 1 / (1 + np.exp(-logits))
    y = np.where(right, 1 - smoothing / 2, smoothing / 2)
    expected = -(y * np.log(p) + (1 - y) * np.log(1 - p)).sum()
    term = BinaryCrossEntropy(torch.from_numpy(logits), torch.from_numpy(right))
    assert term.loss_sum(smoothing).item() == pytest.approx(expected, rel=1e-5)
    assert len(term) == texts * labels
    assert term.correct() == ((p > 0.5) == right).sum()


def test_squared_error_by_hand():
    term = SquaredError(torch.tensor([[1.0], [-2.0], [0.5]]), torch.tensor([3.0, -2.0, 0.0]))
    assert term.loss_sum().item() == 4.25 and len(term) == 3
    assert term.predictions().tolist() == [1.0, -2.0, 0.5]


def test_contrastive_loss_by_hand():
    rng = np.random.default_rng(0)
    vectors, temperature = rng.normal(size=(6, 5)), 0.3
    wrong = ~np.eye(3, dtype=bool)
    wrong[0, 2] = wrong[2, 0] = False  # the first and the last text mean the same
    ids = pack([torch.zeros(1, dtype=torch.long)] * 6)
    batch = ContrastiveBatch(ids, torch.from_numpy(wrong), torch.tensor(temperature))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    expected, right = 0.0, 0
    for i in range(3):
        compared = [j for j in range(3) if j == i or wrong[i, j]]
        scores = {j: math.exp(unit[i] @ unit[3 + j] / temperature) for j in compared}
        expected -= math.log(scores[i] / sum(scores.values()))
        right += max(scores, key=scores.__getitem__) == i
    term = contrastive(torch.from_numpy(vectors), batch)
    assert term.loss_sum().item() == pytest.approx(expected, rel=1e-5)
    assert term.correct() == right and len(term) == 3
