"""BPE-dropout: words cut into other pieces in every epoch (Provilkov et al. 2020, algorithm 1).

The tokenizers library draws its dropout from a generator that cannot be seeded, so the procedure is here.
It works on ids: a token is taken apart by the merges that made it, and put together by merges drawn anew.
"""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np

from qkv.data.dataset import Ids
from qkv.errors import InputError
from qkv.tokenizers import Tokenizer


class BPEDropout:
    """Other segmentations of what a tokenizer has cut into byte pairs."""

    def __init__(self, tokenizer: Tokenizer, rate: float) -> None:
        """rate: the probability of leaving out a merge. Raises InputError for tokenizers without merges."""
        model = json.loads(tokenizer.backend.to_str())["model"]
        if model["type"] != "BPE" or model["ignore_merges"]:
            raise InputError(
                "data.bpe_dropout needs a tokenizer of byte pairs: set tokenizer.kind to bpe, or "
                "data.bpe_dropout to 0"
            )
        self.rate = rate
        vocab: dict[str, int] = model["vocab"]
        prefix = model["continuing_subword_prefix"] or ""
        self.merges: dict[tuple[int, int], tuple[int, int]] = {}
        """Pair of ids -> rank, the lowest first, and the id that it becomes."""
        self.symbols: dict[int, tuple[int, ...]] = {id: (id,) for id in range(tokenizer.vocab_size)}
        """Id -> what it is made of before any merge."""
        for rank, (left, right) in enumerate(model["merges"]):
            pair, whole = (vocab[left], vocab[right]), vocab[left + right.removeprefix(prefix)]
            self.merges[pair] = rank, whole
            self.symbols[whole] = self.symbols[pair[0]] + self.symbols[pair[1]]

    def segment(self, ids: Ids, begins: Ids, rng: np.random.Generator) -> Ids:
        """Whole words' tokens, with 1 in `begins` where one begins, in a segmentation drawn with `rng`."""
        drawn: list[int] = []
        for word in np.split(ids, np.flatnonzero(begins)[1:]):
            drawn += self._word([symbol for id in word.tolist() for symbol in self.symbols[id]], rng)
        return np.array(drawn, dtype=np.int64)

    def _word(self, symbols: list[int], rng: np.random.Generator) -> list[int]:
        """Merge the pair of lowest rank, leftmost first, among those not left out; until none remains.

        Every occurrence of a pair is drawn on its own, and anew before each merge.
        """
        while len(symbols) > 1:
            kept = rng.random(len(symbols) - 1) >= self.rate
            possible = [
                (*self.merges[pair], place)
                for place, pair in enumerate(pairwise(symbols))
                if kept[place] and pair in self.merges
            ]
            if not possible:
                break
            _, whole, place = min(possible, key=lambda merge: (merge[0], merge[2]))
            symbols[place : place + 2] = [whole]
        return symbols
