"""Running text for language models: windows over documents laid end to end.

Legend: T tokens of the batch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from qkv.data.batches import LanguageBatch
from qkv.data.dataset import Dataset, Ids, check_vocabulary, join, lay, tokenise
from qkv.errors import InputError
from qkv.tokenizers import Tokenizer

_SEAM = re.compile(r"(?<=\S)\n(?=\S)")
_PIECE = 1 << 16


def pieces(text: str) -> Iterator[str]:
    """Parts of some ten thousand characters, whose tokens are those of the whole text.

    Tokenizers split at white space before anything else, and see a lone line break alike in the
    middle and at the end of a text. (One huge text costs them much memory.)
    """
    start = 0
    while seam := _SEAM.search(text, start + _PIECE):
        yield text[start : seam.end()]
        start = seam.end()
    yield text[start:]


class LanguageDataset(Dataset):
    """Windows of `context` tokens, each with its successor (Radford et al. 2018, equation 1).

    The end-of-text token, where there is one, stands before every document. In training the stream
    is a ring that every epoch cuts at another place; without, the windows of its successors cover
    every token but the first exactly once.
    """

    def __init__(
        self, texts: Sequence[str], tokenizer: Tokenizer, context: int, seed: int, training: bool
    ) -> None:
        stream = [np.asarray(ids, dtype=np.int32) for ids in self._ids(texts, tokenizer)]
        self.stream = (
            np.concatenate(stream) if stream else np.zeros(0, dtype=np.int32)
        )  # (length of all texts,)
        if len(self.stream) < 2:
            raise InputError("the text has fewer than 2 tokens; give more text")
        successors = len(self.stream) - 1
        self.width = min(context, successors)
        self.seed = seed
        self.training = training
        self.size_in_bytes = sum(len(text.encode()) for text in texts)
        self.notes = check_vocabulary(self.stream, tokenizer)
        windows = len(self.stream) // self.width if training else -(-successors // self.width)
        self.costs = np.full(windows, self.width)
        if not training:
            self.costs[-1] = successors - (windows - 1) * self.width

    @staticmethod
    def _ids(texts: Sequence[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
        for text in texts:
            if tokenizer.eos_id is not None:
                yield [tokenizer.eos_id]
            yield from tokenise(tokenizer, list(pieces(text)))

    def batch(self, indices: Sequence[int], epoch: int) -> LanguageBatch:
        """Windows as ids (T,) with their successors (T,)."""
        offset = (
            int(np.random.default_rng((self.seed, epoch)).integers(len(self.stream))) if self.training else 0
        )
        windows = [self._window(offset + i * self.width, self.costs[i]) for i in indices]
        return LanguageBatch(lay([w[:-1] for w in windows]), join([w[1:] for w in windows]))

    def _window(self, start: int, length: int) -> Ids:
        """The tokens from `start` on, around the ring, and the one behind them: (length + 1,)."""
        return self.stream.take(np.arange(start, start + length + 1), mode="wrap").astype(np.int64)
