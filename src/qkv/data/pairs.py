"""Sources and their targets for the encoder-decoder.

Legend: S tokens of the sources, T tokens of the targets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qkv.data.batches import PairBatch
from qkv.data.bpe_dropout import BPEDropout
from qkv.data.cache import NO_CACHE, Cache, fingerprint
from qkv.data.dataset import (
    Dataset,
    Ids,
    check_context,
    check_vocabulary,
    join,
    lay,
    tokenise,
    word_begins,
)
from qkv.tokenizers import Tokenizer

_MEASURED = 512
"""Samples from which it is known how many more tokens BPE-dropout makes; they take a part of a second."""


class PairDataset(Dataset):
    """Sources that end with the end token, and targets shifted by one (Vaswani et al. 2017, 3.1)."""

    def __init__(
        self,
        sources: Sequence[str],
        targets: Sequence[str],
        tokenizer: Tokenizer,
        *,
        start_id: int,
        end_id: int,
        context: int,
        truncate: bool,
        cache: Cache = NO_CACHE,
        dropout: BPEDropout | None = None,
        seed: int = 0,
    ) -> None:
        """start_id begins the decoder's input; seed decides what dropout draws.

        Raises InputError for a text over the context, unless cut.
        """
        self.sources, source_content = tokenise(tokenizer, sources, cache)
        self.targets, target_content = tokenise(tokenizer.target, targets, cache)
        self.fingerprint = fingerprint("pairs", source_content, target_content)
        self.notes = tuple(
            f"{side}: {note}"
            for side, texts, ids in (("source", sources, self.sources), ("target", targets, self.targets))
            for note in (
                *check_context(ids.lengths + 1, texts, context, truncate),
                *check_vocabulary(ids.values, tokenizer),
            )
        )
        self.room = context - 1  # beside the end or start token
        self.start = np.array([start_id])
        self.end = np.array([end_id])
        self.seed = seed
        self.dropout = dropout
        source, target = (ids.lengths.clip(max=self.room) for ids in (self.sources, self.targets))
        self.costs = source + target + 2
        if dropout is not None:
            self.begins = [word_begins(tokenizer, texts, cache) for texts in (sources, targets)]
            growth = self._growth()
            self.costs = np.ceil(self.costs * growth).astype(np.int64)
            self.notes += (f"BPE dropout: texts have {growth:.2f} times as many tokens as without.",)

    def _growth(self) -> float:
        """How many times as many tokens the samples have with dropout as without, by some of them."""
        some = np.linspace(0, len(self) - 1, min(len(self), _MEASURED), dtype=np.int64)
        drawn = [len(source) + len(target) + 2 for source, target in (self._sample(i, 0) for i in some)]
        return float(sum(drawn) / self.costs[some].sum())

    def batch(self, indices: Sequence[int], epoch: int) -> PairBatch:
        """Sources (S,), decoder inputs (T,) and labels (T,); without dropout the same in every epoch."""
        drawn = [self._sample(i, epoch) for i in indices]
        targets = [target for _, target in drawn]
        sources: list[Ids] = [np.concatenate([source, self.end]) for source, _ in drawn]
        inputs: list[Ids] = [np.concatenate([self.start, target]) for target in targets]
        return PairBatch(
            lay(sources), lay(inputs), join([np.concatenate([target, self.end]) for target in targets])
        )

    def _sample(self, index: int, epoch: int) -> tuple[Ids, Ids]:
        """Source and target as they are in that epoch; one that dropout makes too long stays as it was."""
        source, target = self.sources[index], self.targets[index]
        if self.dropout is not None:
            rng = np.random.default_rng((self.seed, epoch, index))
            source = self._drop(source, self.begins[0][index], rng, self.dropout)
            target = self._drop(target, self.begins[1][index], rng, self.dropout)
        return source[: self.room], target[: self.room]

    def _drop(self, ids: Ids, begins: Ids, rng: np.random.Generator, dropout: BPEDropout) -> Ids:
        drawn = dropout.segment(ids, begins, rng)
        return drawn if len(drawn) <= self.room else ids
