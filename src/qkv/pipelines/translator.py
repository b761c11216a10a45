"""Text in another language."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar, cast

from qkv import batching
from qkv.batching import windows
from qkv.config import BEAMS
from qkv.decode import Decoding, generate
from qkv.models.transformer import Transformer, TransformerOutput
from qkv.pipelines.base import Pipeline, warn
from qkv.pipelines.texts import Limit, characters, encode
from qkv.ragged import Ragged

OneOrMany = TypeVar("OneOrMany", str, list[str], Iterator[str])
"""A text, a list of texts or an iterator of them; the answer is of the same type."""


class Translator(Pipeline[Transformer]):
    """Translates text."""

    def __call__(self, source: Ragged, target: Ragged) -> TransformerOutput:
        """The model on source ids (S,) and target ids (T,)."""
        return cast(TransformerOutput, self.model(source.to(self.device), target.to(self.device)))

    def translate(
        self,
        texts: OneOrMany,
        *,
        num_beams: int = BEAMS,
        length_penalty: float = 1.0,
        max_new_tokens: int | None = None,
        truncate: bool = False,
    ) -> OneOrMany:
        """The likeliest translation of a text, or of each text of a list or iterator; num_beams=1 is greedy.

        max_new_tokens: at most so many tokens each; None: what the model's context holds. truncate: cut
        texts longer than the context, with a warning that counts them. Raises InputError for such a
        text otherwise.
        """
        context = self.model.config.context
        decoding = Decoding(
            num_beams=num_beams,
            length_penalty=length_penalty,
            temperature=0.0,
            max_new_tokens=context if max_new_tokens is None else max_new_tokens,
        )
        given: Any = [texts] if isinstance(texts, str) else texts
        found: Any = self._translations(given, decoding, truncate)
        if isinstance(texts, Iterator):
            return found  # type: ignore[no-any-return]
        answers: Any = list(found)
        return answers[0] if isinstance(texts, str) else answers  # type: ignore[no-any-return]

    def _translations(self, texts: Iterable[str], decoding: Decoding, truncate: bool) -> Iterator[str]:
        limit = Limit(self.model.config.context, truncate)
        target, eos = self.tokenizer.target, [self.model.config.eos_id]
        done = unfinished = 0
        for window in windows(texts, characters, batching.WINDOW_CHARACTERS // decoding.num_beams):
            window = [text if text.strip() else "" for text in window]
            encodings = limit.encode(encode, self.tokenizer, window, done)
            # Of nothing the model would say whatever is likeliest.
            sources = [one.ids for one, text in zip(encodings, window, strict=True) if text]
            found = iter(generate(self.model, sources, decoding, eos))
            for text in window:
                done += 1
                if not text:
                    yield ""
                    continue
                answer, *_ = next(found)
                unfinished += answer.finish != "eos"
                yield target.decode(answer.ids)
        limit.warn()
        if unfinished:
            most = min(decoding.max_new_tokens, self.model.config.context)
            warn(f"{unfinished} of {done} translations were cut at {most} tokens")
