"""Devices and seeds."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from qkv.errors import InputError
from qkv.runtime import pick_device, seed_all


def test_a_device_that_is_picked_works() -> None:
    for name in ("auto", "cpu"):
        device = pick_device(name)
        assert torch.ones(2, device=device).sum().item() == 2
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(InputError, match=f"device '{name}' is not available"):
        pick_device(name)


def test_one_seed_repeats_every_generator() -> None:
    def numbers() -> tuple[float, float, float]:
        return torch.rand(()).item(), float(np.random.rand()), random.random()

    seed_all(7)
    first = numbers()
    assert numbers() != first
    seed_all(7)
    assert numbers() == first
