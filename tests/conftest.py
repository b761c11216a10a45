"""What all tests share: one thread, one seed, and hypothesis without deadlines."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

# Machines differ in speed, and the first call of a kernel is slow: no test asserts on time.
settings.register_profile(
    "qkv",
    deadline=None,
    max_examples=20,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("qkv")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
