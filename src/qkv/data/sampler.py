"""The order of the samples, and how many of them make a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np

from qkv.data.dataset import Ids

_POOL = 64
"""Batches whose samples are sorted together: similar lengths meet, and yet every epoch has other batches."""


class Sampler:
    """Batches of sample indices: a pure function of the seed and the epoch.

    A batch holds at most `batch_tokens` tokens, or one sample that is longer than that. Where samples are
    of several groups, the batches of all groups are shuffled together, so that each group has its share of
    the steps throughout (Liu et al. 2019, algorithm 1).
    """

    def __init__(self, costs: Ids, batch_tokens: int, seed: int, groups: Ids | None = None) -> None:
        """costs, groups: as of a Dataset; without groups, there is one."""
        self.costs = costs
        self.groups = np.zeros(len(costs), dtype=np.int64) if groups is None else groups
        self.batch_tokens = batch_tokens
        self.seed = seed

    def epoch(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch: every sample once, in random order, samples of similar cost together."""
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.costs))
        batches: list[list[int]] = []
        for group in np.unique(self.groups):
            batches += self._of_group(order[self.groups[order] == group])
        return [batches[i] for i in rng.permutation(len(batches))]

    def batches(self, start_step: int = 0) -> Iterator[tuple[int, list[int]]]:
        """Without end, (epoch, batch) from the batch `start_step` of a run onwards."""
        skip = start_step
        for epoch in count():
            batches = self.epoch(epoch)
            for batch in batches[skip:]:
                yield epoch, batch
            skip = max(0, skip - len(batches))

    def _of_group(self, order: Ids) -> list[list[int]]:
        """The batches of a group's samples, which are in random order."""
        pool = max(1, int(_POOL * self.batch_tokens / max(self.costs[order].mean(), 1.0)))
        batches: list[list[int]] = []
        for start in range(0, len(order), pool):
            members = order[start : start + pool]
            members = members[np.argsort(self.costs[members], kind="stable")]
            batches += self._cut(members.tolist(), self.costs[members].tolist())
        return batches

    def _cut(self, members: Sequence[int], costs: Sequence[int]) -> list[list[int]]:
        """Split in order, each part as long as the tokens allow."""
        parts: list[list[int]] = []
        total = 0
        for member, cost in zip(members, costs, strict=True):
            if not parts or total + cost > self.batch_tokens:
                parts.append([])
                total = 0
            parts[-1].append(member)
            total += cost
        return parts
