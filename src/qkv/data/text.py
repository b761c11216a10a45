"""Running text for language models: windows over documents laid end to end.

Legend: T tokens of the batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np

from qkv.data.batches import LanguageBatch
from qkv.data.bpe_dropout import BPEDropout
from qkv.data.cache import NO_CACHE, Cache, Chunks, fingerprint
from qkv.data.dataset import (
    TOKENIZERS,
    Dataset,
    Ids,
    check_vocabulary,
    digest,
    flat,
    id_dtype,
    join,
    lay,
)
from qkv.data.files import TextFile
from qkv.errors import InputError
from qkv.tokenizers import Tokenizer

_SEAM = re.compile(r"(?<=\S)\n(?=\S)|[ \t\r\n](?=[ \n]\S)")
_PIECE = 1 << 16
_PIECES = 32
"""As many at a time keep all threads of the tokenizer busy, and its memory small."""


def pieces(text: str | TextFile) -> Iterator[str]:
    """Parts of some ten thousand characters, whose tokens are those of the whole text.

    Tokenizers split at white space before anything else. They see a lone line break alike in the middle
    and at the end of a text, and the last of several spaces or line breaks apart from those before it. (One
    huge text costs them much memory.)
    """
    rest, seen = "", 0  # up to where it has no seam
    for part in [text] if isinstance(text, str) else text.parts():
        rest += part
        start = 0
        while seam := _SEAM.search(rest, max(start + _PIECE, seen)):
            yield rest[start : seam.end()]
            start = seam.end()
        rest = rest[start:]
        seen = max(len(rest) - 2, 0)  # of what stands there, what follows is not known yet
    yield rest


class LanguageDataset(Dataset):
    """Windows of `context` tokens, each with its successor (Radford et al. 2018, equation 1).

    The end-of-text token, where there is one, stands before every document. In training the stream
    is a ring that every epoch cuts at another place; without, the windows of its successors cover
    every token but the first exactly once.
    """

    def __init__(
        self,
        texts: Sequence[str] | Sequence[TextFile],
        tokenizer: Tokenizer,
        context: int,
        seed: int,
        training: bool,
        cache: Cache = NO_CACHE,
        dropout: BPEDropout | None = None,
    ) -> None:
        """dropout: a window begins at its place, and holds as much of its text as has room."""
        eos = tokenizer.eos_id
        content, self.size_in_bytes = digest(texts)
        made_from = (tokenizer.definition, str(eos), content)
        self.fingerprint = fingerprint("stream", *made_from)
        self.stream = _end_to_end(
            texts, tokenizer.plain_batch, eos, id_dtype(tokenizer), self.fingerprint, cache
        )
        if len(self.stream) < 2:
            raise InputError("the text has fewer than 2 tokens; give more text")
        successors = len(self.stream) - 1
        self.width = min(context, successors)
        self.seed = seed
        self.training = training
        self.dropout = dropout
        if dropout is not None:
            begins, of_eos = fingerprint("begins", *made_from), None if eos is None else 1
            self.begins = _end_to_end(texts, tokenizer.word_begins, of_eos, np.uint8, begins, cache)
        self.notes = check_vocabulary(self.stream, tokenizer)
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
    texts: Sequence[str] | Sequence[TextFile],
    values: Callable[[Sequence[str]], Sequence[Sequence[int]]],
    before: int | None,
    dtype: type[np.integer],
    made_from: str,
    cache: Cache,
) -> np.ndarray:
    """Values of all tokens, (length of all texts,); `before` each text that of the end-of-text token."""

    def chunks() -> Chunks:
        begin = np.array([] if before is None else [before], dtype)
        yield 0, {"values": np.zeros(0, dtype)}
        for text in texts:
            yield 0, {"values": begin}
            parts = pieces(text)
            while some := list(islice(parts, _PIECES)):
                yield sum(map(len, some)), {"values": flat(values(some), dtype)}

    return cache.get(made_from, TOKENIZERS, chunks, "characters tokenised", sum(map(len, texts)))["values"]
