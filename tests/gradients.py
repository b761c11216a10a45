"""The gradients of single steps in one process or, with torchrun, in several; run by test_distributed.

`gradients.py RECIPE OUT` writes a file of the losses and gradients for each way to divide the steps.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from qkv.config import RunConfig, read_toml
from qkv.distributed import Ranks, process_group, whole
from qkv.job import new_job
from qkv.trainer import Trainer

STEPS = (range(64), range(0, 70, 5), [3, 4, 5], [7])
"""Samples of the steps; the last one has fewer than there are ranks."""


def gradients(config: RunConfig, ranks: Ranks, accumulation: int, shard_ranks: int = 1) -> dict[str, Tensor]:
    """The loss and all gradients of each step, whole."""
    parts = {"gradient_accumulation_steps": accumulation, "shard_ranks": shard_ranks}
    job = new_job(dataclasses.replace(config, train=dataclasses.replace(config.train, **parts)))
    trainer = Trainer(job.config.train, job.checkpoint, job.train, ranks)
    found = {}
    for number, indices in enumerate(STEPS):
        trainer.model.zero_grad()
        loss = trainer.backward(trainer.data(0, list(indices)).batches)
        found[f"{number}.loss"] = torch.tensor(ranks.sum([loss]))
        for name, p in trainer.model.named_parameters():
            if p.grad is not None:
                found[f"{number}.{name}"] = whole(p.grad).contiguous()
    return found


def main() -> None:
    config, out = read_toml(Path(sys.argv[1])), Path(sys.argv[2])
    torch.set_num_threads(1)
    with process_group() as ranks:
        for accumulation, shard_ranks in ((1, 1), (1, 2), (3, 2)):
            found = gradients(config, ranks, accumulation, shard_ranks)
            if ranks.first:
                save_file(found, out / f"{accumulation}-{shard_ranks}.safetensors")


if __name__ == "__main__":
    main()
