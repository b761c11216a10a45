"""Several tasks as one dataset: each batch is of one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qkv.data.batches import TaskBatch
from qkv.data.cache import fingerprint
from qkv.data.dataset import Dataset, Ids


class MultiTaskDataset(Dataset):
    """The samples of all tasks, one task behind the other."""

    def __init__(self, tasks: Mapping[str, Dataset], labels: Mapping[str, tuple[str, ...]]) -> None:
        """tasks: by name, at least one. labels: what the answers of each mean, as part of its fingerprint."""
        self.tasks = dict(tasks)
        sizes = [len(task) for task in tasks.values()]
        self._names = tuple(tasks)
        self._starts = np.cumsum([0, *sizes])
        self._groups = np.repeat(np.arange(len(sizes)), sizes)
        self.costs = np.concatenate([task.costs for task in tasks.values()])
        parts = [(name, task.fingerprint, repr(labels[name])) for name, task in tasks.items()]
        self.fingerprint = fingerprint("multitask", *(text for part in parts for text in part))

    @property
    def lengths(self) -> Ids:
        """Tokens of each sample of each task."""
        return np.concatenate([task.lengths for task in self.tasks.values()])

    @property
    def groups(self) -> Ids:
        """The number of each sample's task."""
        return self._groups

    def batch(self, indices: Sequence[int], epoch: int) -> TaskBatch:
        """Samples of one task, as that makes a batch of them."""
        (group,) = set(self._groups[list(indices)].tolist())
        name, start = self._names[group], int(self._starts[group])
        return TaskBatch(name, self.tasks[name].batch([i - start for i in indices], epoch))
