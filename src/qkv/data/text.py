"""Running text for language models: windows over documents laid end to end.

Legend: T tokens of the batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from qkv.data.batches import LanguageBatch
from qkv.data.bpe_dropout import BPEDropout
from qkv.data.dataset import Dataset, Ids, join, lay, tokenise, word_begins
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
        self,
        texts: Sequence[str],
        tokenizer: Tokenizer,
        context: int,
        seed: int,
        training: bool,
        dropout: BPEDropout | None = None,
    ) -> None:
        """dropout: a window begins at its place, and holds as much of its text as has room."""
        eos = tokenizer.eos_id
        self.stream = _end_to_end(texts, tokenizer, tokenise, eos)  # (length of all texts,)
        if len(self.stream) < 2:
            raise InputError("the text has fewer than 2 tokens; give more text")
        successors = len(self.stream) - 1
        self.width = min(context, successors)
        self.seed = seed
        self.training = training
        self.dropout = dropout
        if dropout is not None:
            self.begins = _end_to_end(texts, tokenizer, word_begins, None if eos is None else 1)
        self.size_in_bytes = sum(len(text.encode()) for text in texts)
        self.notes = _unknown(self.stream, tokenizer)
        windows = len(self.stream) // self.width if training else -(-successors // self.width)
        self.costs = np.full(windows, self.width)
        if not training:
            self.costs[-1] = successors - (windows - 1) * self.width

    def batch(self, indices: Sequence[int], epoch: int) -> LanguageBatch:
        """Windows as ids (T,) with their successors (T,)."""
        offset = (
            int(np.random.default_rng((self.seed, epoch)).integers(len(self.stream))) if self.training else 0
        )
        windows = [self._window(offset + i * self.width, self.costs[i], (epoch, i)) for i in indices]
        return LanguageBatch(lay([w[:-1] for w in windows]), join([w[1:] for w in windows]))

    def _window(self, start: int, length: int, sample: tuple[int, int]) -> Ids:
        """The tokens from `start` on, around the ring, and the one behind them: (length + 1,)."""
        places = np.arange(start, start + length + 1)
        window = self.stream.take(places, mode="wrap").astype(np.int64)
        if self.dropout is None:
            return window
        begins = self.begins.take(places, mode="wrap").astype(np.int64)
        words = np.flatnonzero(begins)
        if len(words) < 2:
            return window
        first, last = words[0], words[-1]  # what is before and behind may be parts of words
        rng = np.random.default_rng((self.seed, *sample))
        drawn = self.dropout.segment(window[first:last], begins[first:last], rng)
        return np.concatenate([window[:first], drawn, window[last:]])[: length + 1]


def _end_to_end(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    values: Callable[[Tokenizer, Sequence[str]], Iterator[Sequence[int]]],
    before: int | None,
) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """Values of all tokens; `before` each text that of the end-of-text token, if there is one."""
    parts: list[Sequence[int]] = [[]]
    for text in texts:
        parts += [] if before is None else [[before]]
        parts += values(tokenizer, list(pieces(text)))
    return np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])


def _unknown(stream: np.ndarray, tokenizer: Tokenizer) -> tuple[str, ...]:
    """What to tell about tokens that the vocabulary cannot say."""
    count = 0 if tokenizer.unk_id is None else int((stream == tokenizer.unk_id).sum())
    if not count:
        return ()
    return (
        f"{count:,} of {len(stream):,} tokens are unknown to the tokenizer; scores count them as one token.",
    )
