"""Text that goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypedDict, TypeVar, Unpack, cast, overload

from qkv.completion import Completion
from qkv.decode import Decoding, engine_for
from qkv.errors import InputError
from qkv.models.gpt import GPT, GPTOutput
from qkv.pipelines.base import Pipeline, warn
from qkv.pipelines.texts import check_list
from qkv.ragged import Ragged
from qkv.search import Request

OneOrMany = TypeVar("OneOrMany", str, list[str])
"""A text or a list of texts; the answer is of the same type."""


class DecodingOptions(TypedDict, total=False):
    """The fields of `qkv.decode.Decoding`, which says what each means and checks them."""

    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    num_beams: int
    length_penalty: float
    repetition_penalty: float
    num_return_sequences: int
    speculate: int
    logprobs: int
    seed: int


class TextGenerator(Pipeline[GPT]):
    """Continues text."""

    def __call__(self, batch: Ragged) -> GPTOutput:
        """The model on ids (T,)."""
        return cast(GPTOutput, self.model(batch.to(self.device)))

    @overload
    def generate(
        self,
        text: OneOrMany,
        *,
        stream: Literal[False] = False,
        stop_strings: Sequence[str] = (),
        draft: TextGenerator | None = None,
        **options: Unpack[DecodingOptions],
    ) -> OneOrMany: ...
    @overload
    def generate(
        self,
        text: str,
        *,
        stream: Literal[True],
        stop_strings: Sequence[str] = (),
        draft: TextGenerator | None = None,
        **options: Unpack[DecodingOptions],
    ) -> Iterator[str]: ...
    def generate(
        self,
        text: str | list[str],
        *,
        stream: bool = False,
        stop_strings: Sequence[str] = (),
        draft: TextGenerator | None = None,
        **options: Unpack[DecodingOptions],
    ) -> str | list[str] | Iterator[str]:
        """What follows a text; options are the fields of `qkv.decode.Decoding`.

        One text gives one answer, or with stream=True an iterator of its pieces, none of which splits a
        character (beam search gives the whole in one piece). A list gives a list: the
        `num_return_sequences` answers of the first text, of the second, and so on. An empty text starts
        from the tokenizer's begin token. stop_strings: an answer ends before the one that is complete
        first. draft: a smaller model that guesses where `speculate` is set. Raises InputError for a text
        longer than the context.
        """
        decoding = Decoding(**options)
        if decoding.logprobs:
            raise InputError("generate gives text alone: log-probabilities come with complete")
        if isinstance(text, str):
            if decoding.num_return_sequences > 1:
                raise InputError("several answers come as a list: give the text in a list")
            pieces = (piece for _, piece in self._decode([text], decoding, stop_strings, draft))
            return pieces if stream else "".join(pieces)
        if stream:
            raise InputError("only one text can be streamed: give it alone, not in a list")
        answers = self.complete(text, stop_strings=stop_strings, draft=draft, **options)
        return [answer.text for answer in answers]

    def complete(
        self,
        texts: list[str],
        *,
        stop_strings: Sequence[str] = (),
        draft: TextGenerator | None = None,
        **options: Unpack[DecodingOptions],
    ) -> list[Completion]:
        """What `generate` gives for a list, with tokens, why each answer ended, and what `logprobs` asks for.

        Arguments and errors as for `generate`.
        """
        check_list(texts)
        decoded = self._decode(texts, Decoding(**options), stop_strings, draft)
        found = dict.fromkeys(completion for completion, _ in decoded)
        return sorted(found, key=lambda completion: completion.place)

    def _decode(
        self,
        texts: list[str],
        decoding: Decoding,
        stop_strings: Sequence[str],
        draft: TextGenerator | None,
    ) -> Iterator[tuple[Completion, str]]:
        """Each answer to the texts as often as there is more of its text, with that piece; inputs checked."""
        if draft is not None:
            self._check_draft(draft, decoding)
        prompts = self.prompts(texts)
        engine = engine_for(self.model, prompts, decoding, None if draft is None else draft.model)
        answers: dict[tuple[int, int], Completion] = {}
        for prompt in prompts:
            number = engine.submit(Request(prompt, decoding, self.eos))
            for answer in range(decoding.num_return_sequences):
                answers[number, answer] = Completion(self.tokenizer, stop_strings, (number, answer), prompt)

        def pieces() -> Iterator[tuple[Completion, str]]:
            for token in engine.run():
                completion = answers[token.request, token.answer]
                yield completion, completion.push(token)
                if completion.finish == "stop":
                    engine.cancel(token.request, token.answer)
            ends = [completion.finish for completion in answers.values()]
            if full := ends.count("context"):
                context = self.model.config.context
                warn(f"{full} of {len(ends)} answers ended where the context of {context} tokens was full")

        return pieces()

    @property
    def eos(self) -> list[int]:
        """Ids that end an answer."""
        return [] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id]

    def prompts(self, texts: list[str]) -> list[list[int]]:
        """What the model reads of each text; of an empty one its begin token. InputError: it has none."""
        prompts = [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]
        if [] not in prompts:
            return prompts
        if self.tokenizer.bos_id is None:
            raise InputError("an empty text has nothing to continue, and this tokenizer has no begin token")
        return [ids or [self.tokenizer.bos_id] for ids in prompts]

    def _check_draft(self, draft: TextGenerator, decoding: Decoding) -> None:
        if not decoding.speculate:
            raise InputError(
                "a draft model guesses so many tokens as speculate says: set it, or leave out draft"
            )
        own, other = (p.tokenizer.backend.get_vocab(with_added_tokens=True) for p in (self, draft))
        if own != other:
            raise InputError("the draft model has another vocabulary: both must have the same tokens")
