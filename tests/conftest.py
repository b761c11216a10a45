"""What all tests share: one thread, one seed, a cache of their own, and hypothesis without deadlines."""

from __future__ import annotations

import os
import tempfile

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


def pytest_configure(config: pytest.Config) -> None:
    """Tell transformers, which asks when it is imported, where to copy the code of folders to."""
    modules = tempfile.TemporaryDirectory()
    os.environ["HF_MODULES_CACHE"] = modules.name
    config.add_cleanup(modules.cleanup)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests, and the processes that they start, neither read nor write the user's cache folder."""
    os.environ["QKV_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
