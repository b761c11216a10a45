"""How fast data become batches: start-up with an empty and a filled cache, batch making, and the step.

usage: python benchmarks/data.py FAMILY DATA   (DATA as for `qkv train FAMILY --data DATA`)

The model is the family's default recipe. A step is forward, backward and AdamW on its batches, which are
made between the steps or prefetched, in turns; medians.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from qkv.config import Family
from qkv.data import Dataset, Sampler, prefetch
from qkv.data.batches import Batch
from qkv.job import Job, new_job
from qkv.objectives import item_counts, loss_terms
from qkv.recipes import default_recipe

BATCHES, STEPS, ROUNDS = 200, 5, 5


def batches(dataset: Dataset, tokens: int) -> Iterator[tuple[int, list[int]]]:
    return Sampler(dataset.costs, tokens, seed=0).batches()


def main(family: Family, data: str) -> None:
    print(f"{family} {data}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    config = default_recipe(family)
    config = replace(config, data=replace(config.data, path=data))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["QKV_CACHE"] = folder
        for name in ("an empty", "a filled"):
            began = time.perf_counter()
            job = new_job(config)
            print(f"ready to train with {name} cache: {time.perf_counter() - began:.2f} s")
        size = sum(file.stat().st_size for file in Path(folder).rglob("*"))
        print(f"the cache has {size / 2**20:.1f} MiB")
        measure(job)


def measure(job: Job) -> None:
    dataset, tokens = job.train, job.config.train.batch_tokens
    items = batches(dataset, tokens)
    made = counted = 0
    began = time.perf_counter()
    for _ in range(BATCHES):
        epoch, indices = next(items)
        dataset.batch(indices, epoch)
        made += len(indices)
        counted += int(dataset.costs[indices].sum())
    seconds = time.perf_counter() - began
    print(f"batches of {tokens:,} tokens: {1e3 * seconds / BATCHES:.2f} ms each")
    print(f"{counted / seconds:,.0f} tokens/s, {made / seconds:,.0f} samples/s")
    model = job.checkpoint.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(batch: Batch) -> None:
        counts = item_counts(batch)
        loss = sum(term.loss_sum() / counts[name] for name, term in loss_terms(model, batch).items())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    took: dict[str, list[float]] = {"between steps": [], "prefetched": []}
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        items = batches(dataset, tokens)
        for _ in range(STEPS):
            epoch, indices = next(items)
            step(dataset.batch(indices, epoch))
        took["between steps"].append((time.perf_counter() - begin) / STEPS)
        with prefetch(lambda item: dataset.batch(item[1], item[0]), batches(dataset, tokens)) as ready:
            begin = time.perf_counter()
            for _ in range(STEPS):
                step(next(ready))
            took["prefetched"].append((time.perf_counter() - begin) / STEPS)
    for name, times in took.items():
        print(f"a step with batches made {name}: {1e3 * statistics.median(times):.1f} ms")


if __name__ == "__main__":
    main(*sys.argv[1:])
