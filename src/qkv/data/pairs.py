"""Sources and their targets for the encoder-decoder.

Legend: S tokens of the sources, T tokens of the targets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qkv.data.batches import PairBatch
from qkv.data.cache import NO_CACHE, Cache, fingerprint
from qkv.data.dataset import Dataset, Ids, check_context, check_vocabulary, join, lay, tokenise
from qkv.tokenizers import Tokenizer


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
    ) -> None:
        """start_id begins the decoder's input. Raises InputError for a text over the context, unless cut."""
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
        self.costs = self.sources.lengths.clip(max=self.room) + self.targets.lengths.clip(max=self.room) + 2

    def batch(self, indices: Sequence[int], epoch: int) -> PairBatch:
        """Sources (S,), decoder inputs (T,) and labels (T,); the same in every epoch."""
        targets = [self.targets[i][: self.room] for i in indices]
        sources: list[Ids] = [np.concatenate([self.sources[i][: self.room], self.end]) for i in indices]
        inputs: list[Ids] = [np.concatenate([self.start, target]) for target in targets]
        return PairBatch(
            lay(sources), lay(inputs), join([np.concatenate([target, self.end]) for target in targets])
        )
