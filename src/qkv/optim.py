"""The optimisers and their learning-rate schedules."""

from __future__ import annotations

import math
import re

import torch
from torch import nn

from qkv.config import TrainConfig


def optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """What steps the model's parameters, all at one learning rate; weight decay is on matrices only.

    adamw: AdamW (Loshchilov and Hutter 2019) for all. muon: Muon (Jordan et al. 2024) for the matrices of
    the blocks, its updates scaled to AdamW's (Liu et al. 2025, 2.2), and AdamW for the rest.
    """
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = re.compile(r"(blocks|encoder|decoder)\.\d+\..*weight")
    muon = [
        p for name, p in parameters if config.optimizer == "muon" and p.dim() == 2 and hidden.fullmatch(name)
    ]
    rest = [p for _, p in parameters if all(p is not q for q in muon)]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    adamw = torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, fused=True
    )
    if not muon:
        return [adamw]
    decay = config.weight_decay
    return [torch.optim.Muon(muon, config.learning_rate, decay, adjust_lr_fn="match_rms_adamw"), adamw]


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
