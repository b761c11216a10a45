"""Texts as pipelines are given them: alone or in pairs, as long as a model reads, or cut to that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from qkv.errors import InputError
from qkv.pipelines.base import NumberedError, warn
from qkv.tokenizers import Encoding, Tokenizer, WordEncoding

TextOrPair = str | tuple[str, str]
"""A text, or two that are read together."""

Input = TypeVar("Input")
Tokens = TypeVar("Tokens", Encoding, WordEncoding)


class Limit:
    """The most tokens that a text may have for one tokenizer, and how many texts had more."""

    def __init__(self, tokens: int, truncate: bool) -> None:
        self.tokens = tokens
        self.truncate = truncate
        self.shorter: Tokenizer | None = None
        """The tokenizer that cuts texts, once there is one to cut."""
        self.seen = self.cut = 0

    def encode(
        self,
        encode: Callable[[Tokenizer, list[Input]], list[Tokens]],
        tokenizer: Tokenizer,
        texts: list[Input],
        first: int,
    ) -> list[Tokens]:
        """Each text, cut if it must and may be; the first one has that number among all."""
        encodings = encode(tokenizer, texts)
        if over := self._over([len(encoding.ids) for encoding in encodings], first):
            self.shorter = self.shorter or tokenizer.shortened(self.tokens)
            cut = encode(self.shorter, [texts[i] for i in over])
            for i, encoding in zip(over, cut, strict=True):
                encodings[i] = encoding
        return encodings

    def _over(self, lengths: list[int], first: int) -> list[int]:
        """Which of these texts have more. Raises NumberedError for the first one unless they may be cut."""
        over = [i for i, length in enumerate(lengths) if length > self.tokens]
        if over and not self.truncate:
            said = f"has {lengths[over[0]]} tokens; the limit is {self.tokens}"
            help = "shorten it, or cut it with truncate=True (--truncate)"
            raise NumberedError("text", first + over[0], f"{said}: {help}")
        self.seen += len(lengths)
        self.cut += len(over)
        return over

    def warn(self) -> None:
        """Tell how many texts were cut, when all are done."""
        if self.cut:
            warn(f"{self.cut} of {self.seen} texts were longer than {self.tokens} tokens and were cut")


def encode(tokenizer: Tokenizer, texts: Sequence[TextOrPair]) -> list[Encoding]:
    """Texts and pairs, all at once."""
    alone = [text for text in texts if isinstance(text, str)]
    pairs = [text for text in texts if not isinstance(text, str)]
    if any(len(pair) != 2 for pair in pairs):
        raise InputError("a pair is two texts in a tuple; several texts are given in a list")
    of_alone = iter(tokenizer.encode_batch(alone))
    of_pairs = iter(tokenizer.encode_batch([one for one, _ in pairs], [other for _, other in pairs]))
    return [next(of_alone if isinstance(text, str) else of_pairs) for text in texts]


_MARGIN = 32
"""What a text counts beside its characters: empty ones fill a window too."""


def characters(text: str | tuple[str, ...]) -> int:
    """About how much of a window it takes."""
    return _MARGIN + (len(text) if isinstance(text, str) else sum(map(len, text)))


def check_list(texts: Any) -> None:
    """Raise InputError for a single text."""
    if isinstance(texts, str):
        raise InputError("give a list of texts, not a single one")
