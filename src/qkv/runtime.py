"""Where computation happens and where its randomness comes from. Nothing happens at import."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import nn

from qkv.errors import InputError


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name, such as "cpu" or "cuda:1"; "auto": the GPU if there is one, otherwise the CPU.

    Raises InputError for a name that torch does not know or a device that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()  # a device can be known and yet be absent
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(f"device {name!r} is not available here; give cpu, cuda or auto") from None
    return device


def device_name(device: torch.device) -> str:
    """What the device calls itself, with the number of threads that compute on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = None
    with suppress(OSError):  # Linux alone says it there
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    name = found[1] if found else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; the model is then as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def shortest(call: Callable[[], object], device: torch.device, budget: float = 0.3) -> float:
    """Seconds of the fastest of the calls that `budget` seconds have room for: a busy machine slows some."""
    times: list[float] = []
    call()
    while not times or sum(times) < budget:
        wait(device)
        began = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - began)
    return min(times)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices natively: AVX512-BF16, AMX, Ampere and later."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    features = torch.cpu.get_capabilities()
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # names of glibc's settings in malloc.h
_MOST, _MOST_MAPPED = 2**31 - 4096, 2**25
"""Bytes: the most that mallopt can be given, and the most that older glibc takes as mapping threshold."""


def keep_freed_memory() -> None:
    """Let glibc's malloc keep what is freed instead of giving it back to the system; others do as they do.

    Training frees and takes the same large blocks at every step, and the system clears fresh pages before it
    gives them out. It holds for the whole process.
    """
    if (libc := _glibc()) is not None:
        if not libc.mallopt(_MMAP_THRESHOLD, _MOST):
            libc.mallopt(_MMAP_THRESHOLD, _MOST_MAPPED)
        libc.mallopt(_TRIM_THRESHOLD, _MOST)


def return_freed_memory() -> None:
    """Let glibc's malloc give back to the system what it kept of all that is freed by now."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def keep_few_kernels() -> None:
    """Let oneDNN keep the 64 kernels used last, if it has computed nothing yet and the user has set nothing.

    It compiles one, of about a MiB, for each shape of a product, and would keep a thousand. Ragged batches
    nearly always bring another number of tokens, so most would be kept for nothing. It holds for the whole
    process.
    """
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # the latter of torch's ideep
        os.environ.setdefault(cache, "64")


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
