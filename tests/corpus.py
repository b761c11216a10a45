"""Text in which every token tells where it is from."""

from __future__ import annotations

from collections.abc import Sequence

from qkv.config import Family, TokenizerConfig
from qkv.tokenizers import Tokenizer, train_tokenizer

FIRST = 0x4E00
"""Code point of the first character; one after the other, each is used once."""


def characters(start: int, count: int) -> str:
    """`count` different characters from the place `start` on."""
    return "".join(chr(FIRST + start + i) for i in range(count))


def documents(sentence_lengths: Sequence[Sequence[int]]) -> list[str]:
    """Documents of lines of that many characters; a gap in the numbering separates documents."""
    made, place = [], 0
    for lengths in sentence_lengths:
        lines = []
        for length in lengths:
            lines.append(characters(place, length))
            place += length
        made.append("\n".join(lines))
        place += 1
    return made


def character_tokenizer(family: Family, texts: Sequence[str]) -> Tokenizer:
    """One token a character."""
    return train_tokenizer(TokenizerConfig(kind="char"), family, texts)


def places(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Where each token is from."""
    return [ord(tokenizer.token(id)) - FIRST for id in ids]
