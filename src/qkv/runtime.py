"""Where computation happens and where its randomness comes from. Nothing happens at import."""

from __future__ import annotations

import random

import numpy as np
import torch

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


def seed_all(seed: int) -> None:
    """Seed the global generators of torch (on every device), NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices natively: AVX512-BF16, AMX, Ampere and later."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    features = torch.cpu.get_capabilities()
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))
