"""Texts, each to be found by another one among those of a group.

Legend: T tokens of the batch, N texts of the batch, all groups together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from qkv.data.batches import ContrastiveBatch
from qkv.data.cache import NO_CACHE, Cache, fingerprint
from qkv.data.dataset import Dataset, Ids, encode, lay
from qkv.errors import InputError
from qkv.tokenizers import Tokenizer

_STRATUM = 64
"""Groups whose texts are shuffled together: of similar length, and yet every epoch has other groups."""


class ContrastiveDataset(Dataset):
    """Groups of texts with their pairs: within a group, other texts' pairs are the wrong answers.

    In-batch negatives (Henderson et al. 2017, 4.4; Gao et al. 2021, equations 1 and 4), but that what a
    text is compared with is a function of seed and epoch: a sample here is a group. So neither the size of
    the batch nor how it is divided changes the loss.
    """

    def __init__(
        self,
        texts: Sequence[str],
        pairs: Sequence[str],
        tokenizer: Tokenizer,
        *,
        context: int,
        truncate: bool,
        candidates: int,
        temperature: float,
        seed: int,
        cache: Cache = NO_CACHE,
    ) -> None:
        """pairs: second texts; none: each text is its own pair, which dropout makes a different vector.

        candidates: size of a group, about. Raises InputError for a text over the context that may not be
        cut, and for fewer than two different texts to be found.
        """
        second = pairs or texts
        if min(len(set(texts)), len(set(second))) < 2:
            raise InputError(
                f"contrastive learning, and its score, need at least two different texts to tell apart; here "
                f"is 1 in {len(second)} samples"
            )
        one = encode(tokenizer, texts, (), context, truncate, cache)
        other = encode(tokenizer, pairs, (), context, truncate, cache) if pairs else one
        self.texts, self.pairs = one.ids, other.ids
        self.notes = one.notes + other.notes if pairs else one.notes
        self.fingerprint = fingerprint("contrastive", one.fingerprint, other.fingerprint)
        self.identities = _identity(texts), _identity(second)
        self.temperature = torch.tensor(temperature)
        self.seed = seed
        lengths = self.texts.lengths + self.pairs.lengths
        self.order = np.argsort(lengths, kind="stable")
        count = max(1, len(texts) // candidates)
        self.bounds = np.arange(count + 1) * len(texts) // count  # group i: places bounds[i:i+2] of the order
        self.costs = np.zeros(count, dtype=np.int64)
        for first in range(0, count, _STRATUM):
            last = min(first + _STRATUM, count)
            members = self.order[self.bounds[first] : self.bounds[last]]
            longest = np.sort(lengths[members])[::-1].cumsum()
            self.costs[first:last] = longest[np.diff(self.bounds[first : last + 1]) - 1]

    @property
    def lengths(self) -> Ids:
        """Tokens of each text and of each that belongs to one."""
        return np.concatenate([self.texts.lengths, self.pairs.lengths])

    def group(self, index: int, epoch: int) -> Ids:
        """The texts of a group in that epoch, in which every text is in one."""
        first = index - index % _STRATUM
        last = min(first + _STRATUM, len(self.costs))
        start = self.bounds[first]
        rng = np.random.default_rng((self.seed, epoch, first))
        drawn = rng.permutation(self.order[start : self.bounds[last]])
        return drawn[self.bounds[index] - start : self.bounds[index + 1] - start]

    def batch(self, indices: Sequence[int], epoch: int) -> ContrastiveBatch:
        """The groups `indices`: ids (T,) of their texts and of what belongs to them, and who is compared."""
        groups = [self.group(i, epoch) for i in indices]
        members = np.concatenate(groups)  # (N,)
        owner = np.repeat(np.arange(len(groups)), [len(group) for group in groups])  # (N,)
        wrong = owner[:, None] == owner  # (N, N)
        for identity in self.identities:  # what belongs to another sample of the same text is right too
            wrong &= identity[members][:, None] != identity[members]
        ids = [part[i] for part in (self.texts, self.pairs) for i in members.tolist()]
        return ContrastiveBatch(lay(ids), torch.from_numpy(wrong), self.temperature)


def _identity(texts: Sequence[str]) -> Ids:
    """A number for each text, the same for equal ones."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(text, len(numbers)) for text in texts])
