"""One optimiser step, in one process or many.

A step's samples are divided into parts for gradient accumulation and for the ranks; the sums over all
parts are divided once by the numbers of items in all of them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from qkv.average import Average, average_of
from qkv.config import TrainConfig
from qkv.data import Dataset
from qkv.data.batches import Batch
from qkv.distributed import ALONE, Ranks, spread, whole
from qkv.divergence import check_finite
from qkv.growth import share_at, shrunk
from qkv.hub import Checkpoint
from qkv.layers import Block
from qkv.models import Model
from qkv.objectives import Objective, item_counts
from qkv.optim import learning_rate, optimizers


@dataclass(frozen=True)
class StepData:
    """What one rank computes on in one optimiser step."""

    epoch: int
    batches: list[tuple[Batch, bool]]
    """One for each forward pass, and whether it counts."""
    tokens: float
    """Of all ranks."""


class Trainer:
    """A checkpoint's model with what trains it, on the device where it is, and spread over the ranks."""

    def __init__(
        self, config: TrainConfig, checkpoint: Checkpoint, dataset: Dataset, ranks: Ranks = ALONE
    ) -> None:
        self.config, self.start, self.dataset, self.ranks = config, checkpoint, dataset, ranks
        self.model: Model = checkpoint.model
        self.device = next(self.model.parameters()).device
        for block in (module for module in self.model.modules() if isinstance(module, Block)):
            if config.gradient_checkpointing:
                recomputed = partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)
                block.forward = recomputed  # type: ignore[method-assign]
            if config.torch_compile:
                block.compile()
        self.objective = Objective(self.model, config.label_smoothing_factor, config.r_drop)
        self.bf16 = config.precision == "bf16"
        # The model to save: the first rank's whole copy of one that is spread.
        self.saved = copy.deepcopy(self.model).cpu() if ranks.count > 1 and ranks.first else self.model
        if ranks.count > 1:
            spread(self.objective, ranks, config.shard_ranks, self.bf16)
        self.optimizers = optimizers(self.model, config)
        self.average: Average = average_of(self.model, config)

    def data(self, epoch: int, indices: Sequence[int]) -> StepData:
        """A step's samples as this rank computes on them.

        The ranks and the accumulation divide the samples alike whatever their numbers are.
        """
        parts = _divide(indices, self.config.gradient_accumulation_steps * self.ranks.count)
        mine = self.ranks.share(parts, spare=indices[:1])
        batches = [(self.dataset.batch(part, epoch).to(self.device), counts) for part, counts in mine]
        return StepData(epoch, batches, float(self.dataset.costs[list(indices)].sum()))

    def step(self, data: StepData, step: int) -> dict[str, float]:
        """One optimiser step over the data of all ranks; what there is to record of it."""
        torch.manual_seed(_step_seed(self.config.seed, step, self.ranks.rank))
        self.objective.train()
        share = share_at(step, self.config)
        batches, lefts = zip(*(shrunk(batch, share) for batch, _ in data.batches), strict=True)
        loss = self.backward(
            [(batch, counts) for batch, (_, counts) in zip(batches, data.batches, strict=True)]
        )
        norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm))
        (total,) = self.ranks.sum([loss])
        check_finite(step, self.config, total, norm.item())
        rate = learning_rate(step, self.config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.average.update(self.model)
        return {
            "epoch": data.epoch,
            "loss": total,
            "grad_norm": norm.item(),
            "learning_rate": rate,
            "tokens": data.tokens * lefts[0],
        }

    def backward(self, batches: Sequence[tuple[Batch, bool]]) -> float:
        """Add the gradients of a step's loss to the parameters'; this rank's share of the loss."""
        names = list(item_counts(batches[0][0]))
        own = [sum(item_counts(batch)[name] for batch, counts in batches if counts) for name in names]
        totals = dict(zip(names, map(int, self.ranks.sum(own)), strict=True))
        loss = torch.zeros((), device=self.device)
        for number, (batch, counts) in enumerate(batches, start=1):
            if self.ranks.count > 1:
                self.objective.set_requires_gradient_sync(number == len(batches))  # type: ignore[operator]
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                part = self.objective(batch, totals) * float(counts)
            part.backward()
            loss += part.detach()
        return loss.item()

    def checkpoint(self) -> Checkpoint | None:
        """The model with the weights that it has now, whole; on ranks but the first None."""
        if self.ranks.count > 1:
            weights = {name: whole(tensor.detach()).cpu() for name, tensor in self.model.state_dict().items()}
            if not self.ranks.first:
                return None
            self.saved.load_state_dict(weights)
        return replace(self.start, model=self.saved)


def _divide(indices: Sequence[int], parts: int) -> list[Sequence[int]]:
    """Contiguous parts of nearly equal size, none empty."""
    size = math.ceil(len(indices) / parts)
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def _step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of one step on one rank: a hash of 63 bits."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> np.uint64(1))
