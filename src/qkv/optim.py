"""The optimisers and their learning-rate schedules."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import nn

from qkv.config import TrainConfig


def optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """What steps the model's parameters; a group's `lr_scale` is its share of the learning rate.

    adamw: AdamW (Loshchilov and Hutter 2019) for all. muon: Muon (Jordan et al. 2024) for the matrices of
    the blocks, its updates scaled to AdamW's (Liu et al. 2025, 2.2), and AdamW for the rest. Weight decay
    is on matrices and kernels of convolutions only.
    """
    layers = _layers(model)
    top = max(layers.values(), default=0)
    groups: dict[tuple[bool, bool, int], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            by_muon = config.optimizer == "muon" and p.dim() == 2 and _HIDDEN.match(name) is not None
            groups.setdefault((by_muon, p.dim() >= 2, layers[name]), []).append(p)

    def made(muon: bool) -> list[dict[str, Any]]:
        return [
            {
                "params": parameters,
                "weight_decay": config.weight_decay if matrices else 0.0,
                "lr_scale": config.layer_decay ** (top - layer),
            }
            for (by_muon, matrices, layer), parameters in groups.items()
            if by_muon == muon
        ]

    steppers: list[torch.optim.Optimizer] = []
    if hidden := made(muon=True):
        steppers.append(torch.optim.Muon(hidden, config.learning_rate, adjust_lr_fn="match_rms_adamw"))
    if rest := made(muon=False):
        betas = (config.adam_beta1, config.adam_beta2)
        steppers.append(
            torch.optim.AdamW(rest, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, fused=True)
        )
    return steppers


_HIDDEN = re.compile(r"(?:blocks|encoder|decoder)\.(\d+)\.")


def _layers(model: nn.Module) -> dict[str, int]:
    """How far up each parameter is: before the blocks 0, in block i i + 1, and behind them above all.

    A decoder's blocks are as far up as the encoder's of the same number.
    """
    names = [name for name, _ in model.named_parameters()]
    found = {name: int(match[1]) + 1 for name in names if (match := _HIDDEN.match(name))}
    first = next((i for i, name in enumerate(names) if name in found), len(names))
    above = max(found.values(), default=0) + 1
    return {name: found.get(name, 0 if i < first else above) for i, name in enumerate(names)}


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
