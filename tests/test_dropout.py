"""Dropout keeps the right share, scales what it keeps, follows the seed, and its gradient is its mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qkv.dropout import Dropout, dropout


@given(st.floats(0.01, 0.95), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_the_share_that_is_zeroed_and_the_scale_of_the_rest(rate, dtype):
    torch.manual_seed(0)
    count = 40_000
    dropped = dropout(torch.ones(count, dtype=dtype), rate)
    zeros = int((dropped == 0).sum())
    deviation = (count * rate * (1 - rate)) ** 0.5
    assert abs(zeros - count * rate) < 5 * deviation
    kept = dropped[dropped != 0]
    assert kept.dtype == dtype
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - rate)))


@given(st.integers(1, 70), st.integers(0, 2**31))
def test_it_is_a_function_of_the_seed_for_every_size(size, seed):
    answers = []
    for _ in range(2):
        torch.manual_seed(seed)
        answers.append(dropout(torch.ones(size, 3), 0.5))
    assert torch.equal(*answers)


def test_elements_are_independent():
    """Neighbours, which share random bits, and elements a word apart are uncorrelated."""
    torch.manual_seed(0)
    kept = (dropout(torch.ones(80_000), 0.3) != 0).double()
    for distance in (1, 2, 3, 4):
        pairs = torch.stack([kept[:-distance], kept[distance:]])
        assert abs(torch.corrcoef(pairs)[0, 1]) < 0.02


def test_the_gradient_is_the_mask():
    x = torch.randn(50, 7, requires_grad=True)
    y = dropout(x, 0.4)
    y.sum().backward()
    torch.testing.assert_close(x.grad * x.detach(), y.detach())


@pytest.mark.parametrize("training", [True, False])
def test_the_module_drops_in_training_only(training):
    module = Dropout(0.5).train(training)
    x = torch.ones(1000)
    assert torch.equal(module(x), x) != training
    assert torch.equal(dropout(x, 0.0), x)
