"""How fast a device is, how much of that a model's training needs, and how long counted work takes at least.

Model FLOPs utilisation (Chowdhery et al. 2022, appendix B) is the share of a device's peak which the
arithmetic of a model's training takes up, each multiplication counted once. A `Roofline` turns what a
`Meter` counted into seconds (Williams et al. 2009).

Legend: S side of a square matrix.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from qkv.config import TrainConfig
from qkv.data import Dataset
from qkv.files import measured
from qkv.meter import Work
from qkv.models import Model
from qkv.objectives import Objective, item_counts
from qkv.runtime import device_name, keep_few_kernels, shortest, wait

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SECONDS = 0.3
"""How long a peak is measured; the product that is under way then is finished."""
SAMPLES = 64
"""How many samples tell what a token of a data set costs."""


def peak(device: torch.device, precision: str) -> float:
    """FLOP/s of the device's best matrix product in "fp32" or "bf16".

    Measured once for a device, precision and version of torch, and remembered in a file of the user's cache
    folder. A machine that is busy meanwhile gives too low a number: delete the file to measure again.
    """
    # How fp32 is multiplied, as itself or as TF32, is a setting.
    how = torch.get_float32_matmul_precision() if precision == "fp32" else "native"
    key = f"{device_name(device)}; torch {torch.__version__}; {precision} {how}"
    return measured("roofline.json", key, lambda: _measure(device, DTYPES[precision]))


def _measure(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate of (S, S) @ (S, S), S doubling from 256 to 16384 or until the time is up."""
    keep_few_kernels()  # while it can still be said
    best = 0.0
    end = time.perf_counter() + SECONDS
    for side in (256 << i for i in range(7)):
        a, b = (torch.full((side, side), 0.5, device=device, dtype=dtype) for _ in range(2))  # (S, S)
        for _ in range(4):  # the first warms up
            wait(device)
            began = time.perf_counter()
            torch.mm(a, b)
            wait(device)
            done = time.perf_counter()
            best = max(best, 2 * side**3 / (done - began))
            if done > end:
                return best
    return best


def flops_per_token(model: Model, dataset: Dataset, r_drop: float = 0.0) -> float:
    """Multiplications and additions of a training step over its tokens, as a mean over some of the samples.

    r_drop: of the run; above 0 all is done twice. Forward and backward pass, counted on the meta device where
    nothing is computed: no recomputation, and no gradients of frozen weights. Attention counts whole blocks,
    without regard to causal order.
    """
    indices = np.unique(np.linspace(0, len(dataset) - 1, SAMPLES).astype(int))
    groups = dataset.groups[indices]
    twins: dict[int, torch.Tensor] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()
    } | {id(b): b.to("meta") for b in model.buffers()}
    shadow = copy.deepcopy(model, twins)  # the model's make without its weights
    with FlopCounterMode(display=False) as counter:
        for group in np.unique(groups):
            batch = dataset.batch(indices[groups == group].tolist(), epoch=0).to("meta")
            Objective(shadow, r_drop=r_drop)(batch, item_counts(batch)).backward()
    return float(counter.get_total_flops() / dataset.costs[indices].sum())


def full_rate(model: Model, dataset: Dataset, config: TrainConfig, device: torch.device) -> float:
    """Tokens a second at which training would take all of what the device can multiply."""
    return peak(device, config.precision) / flops_per_token(model, dataset, config.r_drop)


# ---------------------------------------------------------------- predicted time


@dataclass(frozen=True)
class Roofline:
    """What a device can sustain."""

    name: str
    flops: dict[torch.dtype, float]
    """Floating-point operations a second in matrix products of a type."""
    bandwidth: float
    """Bytes read and written a second."""

    def __str__(self) -> str:
        rates = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {type}" for type, rate in self.flops.items())
        return f"{rates.replace('torch.', '')}, {self.bandwidth / 1e9:,.0f} GB/s ({self.name})"

    def seconds(self, work: Iterable[Work]) -> float:
        """Time of operators one after the other, each held back by products or by memory alone."""
        slowest = min(self.flops.values())
        return sum(
            max(op.flops / self.flops.get(op.dtype, slowest), op.traffic / self.bandwidth) for op in work
        )


def measure_roofline(device: torch.device, tokens: int, dim: int, mlp_dim: int) -> Roofline:
    """Rates at the sizes of a feed-forward network, (tokens, dim) to (tokens, mlp_dim), in about a second.

    Memory is written as operators write it: into a new tensor.
    """
    rows = min(tokens, 2048)
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(rows, dim, dtype=dtype, device=device)
        weight = torch.ones(dim, mlp_dim, dtype=dtype, device=device)
        out = torch.empty(rows, mlp_dim, dtype=dtype, device=device)
        seconds = shortest(partial(torch.mm, x, weight, out=out), device)
        rates[dtype] = 2 * rows * dim * mlp_dim / seconds
    hidden = torch.ones(min(tokens, 16384), mlp_dim, device=device)
    bandwidth = 2 * hidden.element_size() * hidden.numel() / shortest(partial(torch.mul, hidden, 2.0), device)
    return Roofline(f"measured on {device_name(device)}", rates, bandwidth)
