"""Language models that only count: what a GPT has to beat."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qkv.data.dataset import Ids


class KneserNey:
    """Interpolated modified Kneser-Ney smoothing (Chen and Goodman 1999, 3): the best plain n-gram model.

    The counts, and the discounts that are derived from counts of counts, are of the training tokens only.
    """

    def __init__(self, stream: Ids, order: int, vocab_size: int) -> None:
        """stream: training token ids. A run of `order` ids is kept as one 64-bit number."""
        if vocab_size**order >= 2**63:
            raise ValueError(f"runs of {order} tokens out of {vocab_size} do not fit 64 bits")
        self.vocab_size = vocab_size
        grams, counts = np.unique(_runs(stream, order, vocab_size), return_counts=True)
        self.levels = [_Level(grams, counts, vocab_size)]
        for shorter in range(order - 1, 0, -1):
            # Below the longest, what counts is after how many different tokens a run occurred (equation 21).
            grams, counts = np.unique(grams % vocab_size**shorter, return_counts=True)
            self.levels.append(_Level(grams, counts, vocab_size))
        self.levels.reverse()

    def log_probabilities(self, stream: Ids) -> np.ndarray:
        """ln of each token's probability after those before it; the first `order` - 1 are not asked for."""
        order = len(self.levels)
        known: np.ndarray | float = 1 / self.vocab_size
        for level, runs in zip(self.levels, self._suffixes(stream, order), strict=True):
            known = level.interpolate(runs, known)
        return np.log(known)

    def _suffixes(self, stream: Ids, order: int) -> Iterator[np.ndarray]:
        runs = _runs(stream, order, self.vocab_size)
        for length in range(1, order + 1):
            yield runs % self.vocab_size**length


class _Level:
    """The runs of one length: counts, and how much of each context's probability goes to shorter runs."""

    def __init__(self, grams: np.ndarray, counts: np.ndarray, vocab_size: int) -> None:
        self.grams, self.counts, self.vocab_size = grams, counts, vocab_size
        few = np.bincount(counts.clip(max=4), minlength=5)[1:5].clip(
            min=1
        )  # runs that occurred 1, 2, 3, 4 times
        share = few[0] / (few[0] + 2 * few[1])
        steps = np.arange(1, 4)
        discounts = steps - (steps + 1) * share * few[1:] / few[:3]  # equation 17
        # Where hardly any run is rare (single tokens), the estimates mean nothing.
        discounts = np.where((discounts > 0) & (discounts < steps), discounts, steps / 2)
        self.discounts = np.concatenate([[0.0], discounts])[counts.clip(max=3)]
        self.contexts, which = np.unique(grams // vocab_size, return_inverse=True)
        self.totals = np.bincount(which, counts)
        self.freed = np.bincount(which, self.discounts) / self.totals

    def interpolate(self, runs: np.ndarray, shorter: np.ndarray | float) -> np.ndarray:
        """Probability of each run's last token: discounted counts and, for the rest, that by shorter runs."""
        context, seen = _find(self.contexts, runs // self.vocab_size)
        gram, occurred = _find(self.grams, runs)
        own = np.where(occurred, (self.counts - self.discounts)[gram] / self.totals[context], 0.0)
        return np.where(seen, own + self.freed[context] * shorter, shorter)


def _runs(stream: Ids, length: int, vocab_size: int) -> np.ndarray:
    """Each run of `length` tokens as one number, the last token its lowest digit."""
    runs = np.zeros(len(stream) - length + 1, dtype=np.int64)
    for offset in range(length):
        runs = runs * vocab_size + stream[offset : offset + len(runs)]
    return runs


def _find(known: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each wanted number is among the sorted known ones, and whether it is there."""
    places = np.searchsorted(known, wanted).clip(max=len(known) - 1)
    return places, known[places] == wanted
