"""The optimiser and its learning-rate schedules."""

from __future__ import annotations

import math

import torch
from torch import nn

from qkv.config import TrainConfig


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) with weight decay on matrices only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, fused=True
    )


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of optimiser step 1, 2, ..., max_steps: linear warm-up to `learning_rate`, then the schedule.

    cosine: to a tenth at the end. linear: to zero. inverse_sqrt: as 1 / sqrt(step) (Vaswani et al.
    2017, equation 3, with the peak as a setting).
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    if config.schedule == "inverse_sqrt":
        return peak * math.sqrt(max(warmup, 1) / step)
    done = (step - warmup) / max(config.max_steps - warmup, 1)
    if config.schedule == "cosine":
        return peak * (0.55 + 0.45 * math.cos(math.pi * done))
    if config.schedule == "linear":
        return peak * (1 - done)
    return peak
