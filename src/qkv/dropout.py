"""Dropout (Srivastava et al. 2014), at less cost on a CPU than torch's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def dropout(x: Tensor, rate: float) -> Tensor:
    """x with elements zeroed with probability `rate`, the others scaled by 1 / (1 - rate).

    On a CPU four elements share 64 random bits, so the rate is rounded to a multiple of 2^-16. That takes
    less than half the time of torch's Bernoulli numbers (benchmarks/kernels.py).
    """
    if rate == 0.0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, rate)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)  # from -2^15 on, all equally probable
    kept = (bits >= round(rate * 2**16) - 2**15).to(x.dtype)
    return x * kept.mul_(1.0 / (1.0 - rate))


class Dropout(nn.Dropout):
    """`dropout` in training, nothing in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape -> the same shape."""
        return dropout(x, self.p) if self.training else x
