"""The optimisers and their learning-rate schedules."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from qkv.config import TrainConfig
from qkv.distributed import divided, whole


def optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """What steps the model's parameters; a group's `lr_scale` is its share of the learning rate.

    adamw: AdamW (Loshchilov and Hutter 2019) for all. muon: Muon (Jordan et al. 2024) for the matrices of
    the blocks, queries, keys and values apart, and AdamW for the rest. Weight decay is on matrices and
    kernels of convolutions only.
    """
    layers = _layers(model)
    top = max(layers.values(), default=0)
    groups: dict[tuple[bool, bool, int, int], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            by_muon = config.optimizer == "muon" and p.dim() == 2 and _HIDDEN.match(name) is not None
            parts = 3 if by_muon and name.endswith(".qkv.weight") else 1
            groups.setdefault((by_muon, p.dim() >= 2, layers[name], parts), []).append(p)

    def made(muon: bool) -> list[dict[str, Any]]:
        return [
            {
                "params": parameters,
                "weight_decay": config.weight_decay if matrices else 0.0,
                "lr_scale": config.layer_decay ** (top - layer),
                "parts": parts,
            }
            for (by_muon, matrices, layer, parts), parameters in groups.items()
            if by_muon == muon
        ]

    steppers: list[torch.optim.Optimizer] = []
    if hidden := made(muon=True):
        steppers.append(Muon(hidden, config.learning_rate))
    if rest := made(muon=False):
        betas = (config.adam_beta1, config.adam_beta2)
        steppers.append(
            torch.optim.AdamW(rest, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, fused=True)
        )
    return steppers


class Muon(torch.optim.Muon):
    """torch's Muon, with queries, keys and values as matrices of their own.

    They do better apart than as one matrix of three times the rows (Jordan et al. 2024). All matrices of
    one shape are worked on together: one after the other, they are many small products that a GPU waits
    to be told of.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        """Updates of AdamW's size (Liu et al. 2025, 2.2), with Nesterov's momentum.

        A group may have a rate and decay of its own; its `parts` is of how many matrices, one below the
        other, each of its parameters is made.
        """
        super().__init__(groups, lr, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """As torch's, for each matrix. What is sharded is put together on every rank first."""
        momentum, coefficients, steps, eps = (
            self.defaults[name] for name in ("momentum", "ns_coefficients", "ns_steps", "eps")
        )
        members = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not members:
            return
        parameters = [p for p, _ in members]
        gradients = [p.grad for p in parameters if p.grad is not None]
        momenta = [self._momentum(p) for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - momentum)
        # Not all at once: that is no operation of sharded tensors in every torch.
        updates = [whole(g.lerp(m, momentum)) for g, m in zip(gradients, momenta, strict=True)]
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        scales = []
        for update, (_, group) in zip(updates, members, strict=True):
            parts = update.chunk(group["parts"])
            by_shape[parts[0].shape].extend(parts)
            scales.append(-0.2 * math.sqrt(max(parts[0].shape)) * group["lr"])
        for matrices in by_shape.values():
            directions = orthogonal(torch.stack(matrices), coefficients, steps, eps)
            torch._foreach_copy_(matrices, directions.unbind())
        torch._foreach_mul_(updates, scales)
        torch._foreach_mul_(parameters, [1 - group["lr"] * group["weight_decay"] for _, group in members])
        torch._foreach_add_(parameters, [divided(u, p) for u, p in zip(updates, parameters, strict=True)])

    def _momentum(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        found: Tensor = state["momentum_buffer"]
        return found


def orthogonal(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Matrices (n, rows, columns) with their singular values moved near 1, in bfloat16.

    Newton-Schulz iteration (Jordan et al. 2024) with a, b, c: X <- a X + (b A + c A A) X, A = X X^T.
    """
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    X = matrices.mT if tall else matrices
    X = (X / X.norm(dim=(1, 2), keepdim=True).clamp(min=eps)).bfloat16()
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if tall else X


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
