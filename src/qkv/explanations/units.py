"""What a model reads, cut into the units that an explanation speaks of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Literal

import tokenizers

from qkv.explanations.explanation import Units
from qkv.tokenizers import Pieces, Tokenizer

Name = Literal["text", "source", "target", "image"]
Span = tuple[int, int]


def of_encoding(name: Name, texts: Sequence[str], encoding: tokenizers.Encoding) -> Units:
    """The tokens of one text or of two that were encoded together, as the texts write them."""
    spans = [
        None if part is None else (part, *span)
        for part, span in zip(encoding.sequence_ids, encoding.offsets, strict=True)
    ]
    return _written(name, texts, spans, encoding.tokens, tuple(encoding.type_ids))


def of_words(name: Name, text: str, places: Sequence[Span], encoding: tokenizers.Encoding) -> Units:
    """The tokens of a text that was encoded word by word; places: where in the text each word is."""
    spans = [
        None if word is None else (0, places[word][0] + start, places[word][0] + end)
        for word, (start, end) in zip(encoding.word_ids, encoding.offsets, strict=True)
    ]
    return _written(name, [text], spans, encoding.tokens, ())


def of_text(
    name: Name, tokenizer: Tokenizer, ids: Sequence[int], text: str, places: Sequence[Span | None]
) -> Units:
    """Tokens that stand at these places of a text; None: a marker."""
    spans = [None if place is None else (0, *place) for place in places]
    return _written(name, [text], spans, [tokenizer.token(id) for id in ids], ())


def of_ids(name: Name, tokenizer: Tokenizer, ids: Sequence[int], special: Sequence[bool]) -> Units:
    """Tokens of which there are only ids, as the text that they decode to."""
    pieces = Pieces(tokenizer)
    unknown = tokenizer.unk_id  # of which no text is left, where a word was
    parts = [
        "" if marker else pieces.push(id) or (tokenizer.token(id) if id == unknown else "")
        for id, marker in zip(ids, special, strict=True)
    ]
    ends = accumulate(map(len, parts), initial=0)
    words = _word_numbers("".join(parts))
    units = tuple(part or tokenizer.token(id) for id, part in zip(ids, parts, strict=True))
    found = tuple(_word(words[a:b]) for a, b in pairwise(ends))
    return Units(name, units, tuple(special), words=found)


def written(tokenizer: Tokenizer, id: int) -> str:
    """A token as it stands behind another; as the vocabulary writes it if it is no text by itself."""
    alone = tokenizer.decode([id])
    text = tokenizer.decode([id, id])[len(alone) :]
    return tokenizer.token(id) if not text or "\N{REPLACEMENT CHARACTER}" in text else text


def of_patches(rows: int, columns: int) -> Units:
    """The class token and the patches of an image, row by row."""
    patches = (f"{row},{column}" for row in range(rows) for column in range(columns))
    return Units("image", ("class", *patches), (True, *[False] * (rows * columns)))


def joined(first: Units, second: Units) -> Units:
    """Two texts as the segments of one sequence."""
    count = 1 + max(first.words, default=-1)
    words = (*first.words, *(word if word < 0 else count + word for word in second.words))
    segments = (*[0] * len(first.units), *[1] * len(second.units))
    return Units(first.name, first.units + second.units, first.special + second.special, segments, words)


def _written(
    name: Name,
    texts: Sequence[str],
    spans: Sequence[tuple[int, int, int] | None],
    tokens: Sequence[str],
    segments: tuple[int, ...],
) -> Units:
    """spans: in which text each token stands, from where to where; None: it is a marker."""
    numbers, count = [], 0
    for text in texts:
        numbers.append(_word_numbers(text, count))
        count = 1 + max(numbers[-1], default=count - 1)
    units, words = [], []
    for before, span, token in zip((None, *spans), spans, tokens, strict=False):
        if span is None or span == before:  # a marker, or more of a letter that several tokens make
            units.append(token)
            words.append(-1)
            continue
        which, start, end = span
        text = texts[which]
        free = before is None or before[0] != which or before[2] < start  # no token has the space before it
        spaced = 0 < start < end and free and text[start - 1].isspace() and not text[start].isspace()
        units.append(text[start - spaced : end] or token)
        words.append(_word(numbers[which][start:end]))
    special = tuple(span is None for span in spans)
    return Units(name, tuple(units), special, segments if any(segments) else (), tuple(words))


def _word_numbers(text: str, first: int = 0) -> list[int]:
    """Of each character the number of its word, as white space parts them; -1 of white space."""
    numbers = [-1] * len(text)
    for number, word in enumerate(re.finditer(r"\S+", text), first):
        numbers[word.start() : word.end()] = [number] * len(word[0])
    return numbers


def _word(numbers: Iterable[int]) -> int:
    """The first word among some characters; -1 if they are white space alone."""
    return next((number for number in numbers if number >= 0), -1)
