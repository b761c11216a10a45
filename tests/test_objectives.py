"""Loss terms against hand computations."""

from __future__ import annotations

import math

import pytest
import torch

from qkv.objectives import Term


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_probabilities_as_labels_weigh_the_classes_losses(smoothing: float):
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]])
    shares = torch.tensor([[0.3, 0.0, 0.7], [0.5, 0.5, 0.0]])
    whole = Term(logits, shares)
    by_class = [
        Term(logits[row : row + 1], torch.tensor([k])).loss_sum(smoothing) * shares[row, k]
        for row in range(2)
        for k in range(3)
    ]
    torch.testing.assert_close(whole.loss_sum(smoothing), torch.stack(by_class).sum())
    total = math.log(1 + math.e + math.e**2)  # by hand, for the first row
    first = Term(logits[:1], shares[:1]).loss_sum().item()
    assert first == pytest.approx(0.3 * total + 0.7 * (total - 2), rel=1e-6)


def test_the_likeliest_label_counts_as_the_right_one():
    logits = torch.tensor([[0.0, 2.0], [2.0, 0.0], [2.0, 0.0]])
    assert Term(logits, torch.tensor([1, 0, 1])).correct() == 2
    assert Term(logits, torch.tensor([[0.4, 0.6], [0.9, 0.1], [0.2, 0.8]])).correct() == 2
