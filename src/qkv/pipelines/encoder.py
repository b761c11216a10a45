"""Texts filled in, turned into vectors, classified or tagged.

Legend: T tokens of a batch, N inputs of one, D model width, V vocabulary, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple, TypeVar, cast, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qkv import batching
from qkv.batching import in_order
from qkv.errors import InputError
from qkv.hub.sentence import Pooling
from qkv.models.bert import Bert, BertOutput
from qkv.pipelines.base import Guess, Pipeline, check_top_k, guesses
from qkv.pipelines.texts import Limit, TextOrPair, characters, check_list, encode
from qkv.ragged import Ragged, pack
from qkv.tokenizers import Encoding, Tokenizer, WordEncoding

OneOrPair = TypeVar("OneOrPair", bound=TextOrPair)
TextOrWords = str | tuple[str, ...]
"""A text, or its words."""
OneOrWords = TypeVar("OneOrWords", bound=TextOrWords)
Answer = TypeVar("Answer")


class TaggedWord(NamedTuple):
    """A word of a text, its likeliest tag, and how probable the model finds it."""

    word: str
    """text[start:end]"""
    tag: str
    probability: float
    start: int
    end: int


class Encoder(Pipeline[Bert]):
    """Fills masks, turns texts into vectors, names their classes or tags: as the checkpoint's heads allow."""

    def __call__(self, batch: Ragged, segments: Tensor | None = None) -> BertOutput:
        """The model on ids (T,) and segments (T,)."""
        segments = None if segments is None else segments.to(self.device)
        return cast(BertOutput, self.model(batch.to(self.device), segments))

    @torch.inference_mode()
    def fill(self, text: str, top_k: int = 5) -> list[Guess]:
        """The likeliest tokens in place of the text's mask.

        Raises InputError if there is not exactly one mask, if the text is longer than the context, or
        if the model has no masked language model head.
        """
        check_top_k(top_k)
        mask = self.tokenizer.mask_id
        if mask is None:
            raise InputError("this tokenizer has no mask token: there is nothing to fill")
        encoding = self.tokenizer.encode(text)
        if (masks := encoding.ids.count(mask)) != 1:
            raise InputError(f"the text has {masks} masks; write {self.tokenizer.token(mask)} exactly once")
        hidden = self.model.features(*self._batch([encoding])).values[encoding.ids.index(mask)]  # (D,)
        chances = self.model.word_logits(hidden).float().softmax(-1)  # (V,)
        return guesses(chances[None], self.tokenizer.token, top_k)[0]

    @overload
    def embed(self, texts: list[str], truncate: bool = False) -> NDArray[np.float32]: ...
    @overload
    def embed(self, texts: Iterator[str], truncate: bool = False) -> Iterator[NDArray[np.float32]]: ...
    def embed(
        self, texts: list[str] | Iterator[str], truncate: bool = False
    ) -> NDArray[np.float32] | Iterator[NDArray[np.float32]]:
        """One vector a text, (N, D): the mean over its tokens, unless the checkpoint says otherwise.

        Of an iterator of texts an iterator of vectors (D,).
        truncate: cut texts longer than the checkpoint's `max_tokens`, or else the context, with a warning
        that counts them. Raises InputError for such a text otherwise.
        """
        check_list(texts)
        limit = self.pooling.max_tokens or self.model.config.context
        found = self._encoded(texts, truncate, self._vectors, limit)
        if isinstance(texts, Iterator):
            return found
        vectors = np.empty((len(texts), self.model.config.dim), dtype=np.float32)
        for i, vector in enumerate(found):
            vectors[i] = vector
        return vectors

    @torch.inference_mode()
    def _vectors(self, encodings: list[Encoding]) -> list[NDArray[np.float32]]:
        """Of each text (D,)."""
        hidden = self.model.features(*self._batch(encodings))
        return list(self.pooling.vectors(hidden).cpu().numpy())

    @property
    def pooling(self) -> Pooling:
        """How `embed` makes vectors."""
        return self.checkpoint.pooling or Pooling()

    @overload
    def classify(
        self, texts: TextOrPair, top_k: int | None = None, truncate: bool = False
    ) -> list[Guess]: ...
    @overload
    def classify(
        self, texts: list[OneOrPair], top_k: int | None = None, truncate: bool = False
    ) -> list[list[Guess]]: ...
    @overload
    def classify(
        self, texts: Iterator[OneOrPair], top_k: int | None = None, truncate: bool = False
    ) -> Iterator[list[Guess]]: ...
    def classify(
        self,
        texts: TextOrPair | list[OneOrPair] | Iterator[OneOrPair],
        top_k: int | None = None,
        truncate: bool = False,
    ) -> list[Guess] | list[list[Guess]] | Iterator[list[Guess]]:
        """The likeliest classes of a text or a pair (a tuple of two), or of each of a list of them.

        top_k: so many; None: 5 of classes, all of a multi-label model's, whose probabilities are independent.
        truncate: cut texts longer than the context, with a warning that counts them. Raises InputError
        for such a text otherwise, or if the model has no head of either kind.
        """
        if isinstance(texts, str | tuple):
            return self.classify([texts], top_k, truncate)[0]
        if top_k is not None:
            check_top_k(top_k)
        config = self.model.config
        if config.head not in ("classification", "multi_label"):
            help = "estimate gives its values" if config.head == "regression" else "fine-tune it first"
            raise InputError(f"this model has no classification head but {config.head!r}: {help}")
        several = config.head == "multi_label"
        count = top_k or (len(config.labels) if several else 5)

        def answers(encodings: list[Encoding]) -> list[list[Guess]]:
            logits = self._class_logits(encodings)  # (N, K)
            chances = logits.sigmoid() if several else logits.softmax(-1)
            return guesses(chances, config.labels.__getitem__, count)

        found = self._encoded(texts, truncate, answers)
        return found if isinstance(texts, Iterator) else list(found)

    @overload
    def estimate(self, texts: Sequence[TextOrPair], truncate: bool = False) -> NDArray[np.float32]: ...
    @overload
    def estimate(
        self, texts: Iterator[TextOrPair], truncate: bool = False
    ) -> Iterator[NDArray[np.float32]]: ...
    def estimate(
        self, texts: Sequence[TextOrPair] | Iterator[TextOrPair], truncate: bool = False
    ) -> NDArray[np.float32] | Iterator[NDArray[np.float32]]:
        """The values of texts or pairs, (N, K): K is 1 for models trained here. Of an iterator, of each (K,).

        truncate: cut texts longer than the context, with a warning that counts them. Raises InputError
        for such a text otherwise, or if the model has no regression head.
        """
        check_list(texts)
        config = self.model.config
        if config.head != "regression":
            raise InputError(f"this model has no regression head but {config.head!r}")
        found = self._encoded(texts, truncate, lambda encodings: list(self._class_logits(encodings).numpy()))
        if isinstance(texts, Iterator):
            return found
        return np.array(list(found), dtype=np.float32).reshape(-1, len(config.labels))

    @torch.inference_mode()
    def _class_logits(self, encodings: list[Encoding]) -> Tensor:
        """float32 (N, K), on the CPU."""
        hidden = self.model.features(*self._batch(encodings))
        return self.model.class_logits(hidden.first()).float().cpu()

    @overload
    def tag(self, texts: TextOrWords, truncate: bool = False) -> list[TaggedWord]: ...
    @overload
    def tag(self, texts: list[OneOrWords], truncate: bool = False) -> list[list[TaggedWord]]: ...
    @overload
    def tag(self, texts: Iterator[OneOrWords], truncate: bool = False) -> Iterator[list[TaggedWord]]: ...
    def tag(
        self, texts: TextOrWords | list[OneOrWords] | Iterator[OneOrWords], truncate: bool = False
    ) -> list[TaggedWord] | list[list[TaggedWord]] | Iterator[list[TaggedWord]]:
        """The tag of each word of a text, or of each of a list of texts; its first piece decides.

        A text can be a tuple of its words, which are then read with a space between them: best as they were
        told apart for training. Words of others are what the tokenizer's pre-tokenizer makes of the text. One
        that has no token is left out. truncate: cut texts longer than the context, with a warning that counts
        them: what is cut has no tags. Raises InputError for such a text otherwise, or if the model has no
        tagging head.
        """
        if isinstance(texts, str | tuple):
            return self.tag([texts], truncate)[0]
        if self.model.config.head != "tagging":
            raise InputError(
                f"this model has no tagging head but {self.model.config.head!r}: fine-tune it first"
            )
        found = self._tagged(texts, truncate)
        return found if isinstance(texts, Iterator) else list(found)

    def _tagged(self, texts: Iterable[TextOrWords], truncate: bool) -> Iterator[list[TaggedWord]]:
        limit = Limit(self.model.config.context, truncate)

        def read(window: list[TextOrWords], first: int) -> list[_Words]:
            texts = [text if isinstance(text, str) else " ".join(text) for text in window]
            spans = [
                self.tokenizer.word_spans(text) if isinstance(text, str) else _spans(text) for text in window
            ]
            words = [[text[a:b] for a, b in places] for text, places in zip(texts, spans, strict=True)]
            encodings = limit.encode(Tokenizer.encode_words, self.tokenizer, words, first)
            return [_Words(*one) for one in zip(texts, spans, encodings, strict=True)]

        yield from in_order(
            texts,
            read,
            lambda words: len(words.encoding.ids),
            self._tags,
            characters,
            batching.WINDOW_CHARACTERS,
        )
        limit.warn()

    @torch.inference_mode()
    def _tags(self, batch: list[_Words]) -> list[list[TaggedWord]]:
        labels = self.model.config.labels
        hidden = self.model.features(pack((words.encoding.ids for words in batch), self.device))
        answers = []
        for (text, spans, encoding), states in zip(batch, hidden.split(), strict=True):  # states: (L, D)
            found = [(*span, place) for span, place in zip(spans, encoding.first, strict=True)]
            read = [(start, end, place) for start, end, place in found if place is not None]
            logits = self.model.tag_logits(states[[place for *_, place in read]])  # (M, K)
            best = logits.float().softmax(-1).max(-1)
            answers.append(
                [
                    TaggedWord(text[start:end], labels[k], chance, start, end)
                    for (start, end, _), k, chance in zip(
                        read, best.indices.tolist(), best.values.tolist(), strict=True
                    )
                ]
            )
        return answers

    def _encoded(
        self,
        texts: Iterable[TextOrPair],
        truncate: bool,
        answer: Callable[[list[Encoding]], Sequence[Answer]],
        tokens: int | None = None,
    ) -> Iterator[Answer]:
        """The answer to each text, which may have so many tokens; None: as many as the model reads."""
        limit = Limit(tokens or self.model.config.context, truncate)

        def read(window: list[TextOrPair], first: int) -> list[Encoding]:
            for text in window:
                self.check_parts(1 if isinstance(text, str) else len(text))
            return limit.encode(encode, self.tokenizer, window, first)

        yield from in_order(texts, read, lambda e: len(e.ids), answer, characters, batching.WINDOW_CHARACTERS)
        limit.warn()

    def check_parts(self, count: int) -> None:
        """Raise InputError if an input has so many texts, and this model cannot tell two apart."""
        if count > 1 and self.model.config.segments < 2:
            raise InputError("this model does not tell a second text from the first: give single texts")

    def _batch(self, encodings: list[Encoding]) -> tuple[Ragged, Tensor]:
        """Ids and segments, (T,) each."""
        segments = pack((e.segments for e in encodings), self.device)
        return pack((e.ids for e in encodings), self.device), segments.values


class _Words(NamedTuple):
    """A text to tag."""

    text: str
    spans: list[tuple[int, int]]
    encoding: WordEncoding


def _spans(words: Sequence[str]) -> list[tuple[int, int]]:
    """Where words begin and end if there is a space between them."""
    ends = accumulate(len(word) + 1 for word in words)
    return [(end - 1 - len(word), end - 1) for word, end in zip(words, ends, strict=True)]
