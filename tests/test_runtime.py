"""Devices and seeds."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from qkv.errors import InputError
from qkv.runtime import pick_device


def test_a_device_that_is_picked_works() -> None:
    for name in ("auto", "cpu"):
        device = pick_device(name)
        assert torch.ones(2, device=device).sum().item() == 2
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(InputError, match=f"device '{name}' is not available"):
        pick_device(name)


RAGGED = """
import random, torch
from pathlib import Path
from qkv.runtime import keep_few_kernels

def mebibytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) / 256

keep_few_kernels()
torch.set_num_threads(1)
net = torch.nn.Sequential(torch.nn.Linear(128, 512), torch.nn.Linear(512, 128))
used = []
for tokens in random.Random(0).sample(range(768, 1024), 120):
    with torch.autocast("cpu", torch.bfloat16):
        net(torch.ones(tokens, 128, requires_grad=True)).sum().backward()
    used.append(mebibytes())
print(used[-1] - used[39])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read as Linux tells it")
def test_ever_new_numbers_of_tokens_do_not_fill_the_memory() -> None:
    """In a process of its own, as the setting holds for one: a kernel of oneDNN takes about a MiB."""
    done = subprocess.run([sys.executable, "-c", RAGGED], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 40
