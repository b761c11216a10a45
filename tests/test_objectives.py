"""The cross-entropy that makes its gradient with the loss, beside torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from qkv import objectives
from qkv.objectives import CrossEntropy


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
