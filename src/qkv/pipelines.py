"""Trained models in use: text or images in, answers out.

`from_pretrained` opens a checkpoint as the pipeline of its family. Pipelines only translate between
what people read and what models read: tokens and pixels are made by the checkpoint's own tokenizer
and image processor, answers by the model and the decoding engine. A list gives as many answers, and where
there may be more inputs than memory holds, an iterator gives an iterator, which reads ahead no more than
`batching` says.

Legend: T tokens of a batch, N inputs of one, D model width, V vocabulary, K classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Generic,
    Literal,
    NamedTuple,
    Self,
    TypedDict,
    TypeVar,
    Unpack,
    cast,
    overload,
)

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from qkv import batching, hub
from qkv.attention import Tappable
from qkv.batching import in_order, windows
from qkv.completion import Completion
from qkv.config import BertHead, InferencePrecision
from qkv.decode import Decoding, engine_for, generate
from qkv.errors import InputError
from qkv.hub import Checkpoint
from qkv.hub.sentence import Pooling
from qkv.images import ImageProcessor
from qkv.models.bert import Bert, BertOutput
from qkv.models.gpt import GPT, GPTOutput
from qkv.models.transformer import Transformer, TransformerOutput
from qkv.models.vit import ViT, ViTOutput
from qkv.ragged import Ragged, pack
from qkv.runtime import pick_device
from qkv.search import Request
from qkv.tokenizers import Encoding, Tokenizer, WordEncoding

if TYPE_CHECKING:
    from qkv.fast import Road

M = TypeVar("M", bound=Transformer | Bert | GPT | ViT)

ImageLike = Image.Image | str | Path | bytes
"""An image, its path, or its file's bytes."""
AnyImage = TypeVar("AnyImage", bound=ImageLike)
OneOrMany = TypeVar("OneOrMany", str, list[str], Iterator[str])
"""A text, a list of texts or an iterator of them; the answer is of the same type."""
Answer = TypeVar("Answer")


BEAMS = 4
"""Beam width of `translate`, if nothing else is said."""


class Guess(NamedTuple):
    """One possible answer and how probable the model finds it."""

    name: str
    probability: float


class TaggedWord(NamedTuple):
    """A word of a text, its likeliest tag, and how probable the model finds it."""

    word: str
    """text[start:end]"""
    tag: str
    probability: float
    start: int
    end: int


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


class NumberedError(InputError):
    """One of many inputs cannot be used."""

    def __init__(self, kind: Literal["text", "image"], number: int, said: str) -> None:
        """number: of the input among those given, from 0; said: what is wrong with it, and what to do."""
        super().__init__(f"{kind} {number} {said}")
        self.number = number
        self.said = said


class Pipeline(Generic[M]):
    """A model with what prepares its input. Calling it is calling the model, on its device."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.model: M = cast(M, checkpoint.model.to(device).eval())
        self.road: Road | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer. Raises InputError if it has none."""
        if self.checkpoint.tokenizer is None:
            raise InputError("this checkpoint has no tokenizer: it works on ids, not on text")
        return self.checkpoint.tokenizer

    @property
    def images(self) -> ImageProcessor:
        """The checkpoint's image settings. Raises InputError if it has none."""
        if self.checkpoint.images is None:
            raise InputError(
                "this checkpoint has no preprocessor_config.json: how are images to be prepared?"
            )
        return self.checkpoint.images

    def attentions(self) -> dict[str, list[Tappable]]:
        """The model's attention modules, so that `qkv.record` takes a pipeline."""
        return self.model.attentions()

    def optimize(self, precision: InferencePrecision | Literal["auto"] = "auto") -> Self:
        """Make the model answer faster, as `qkv.fast.optimize` says; returns the pipeline itself."""
        from qkv.fast import optimize  # not needed to answer

        self.road = optimize(self.model, precision)
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the checkpoint as a Hugging Face folder. Raises InputError if it cannot be written."""
        if self.road is not None:
            raise InputError("an optimized model has no weights to save: load it anew, then save it")
        hub.save(folder, self.checkpoint)


# ---------------------------------------------------------------- GPT


class TextGenerator(Pipeline[GPT]):
    """Continues text."""

    def __call__(self, batch: Ragged) -> GPTOutput:
        """The model on ids (T,)."""
        return cast(GPTOutput, self.model(batch.to(self.device)))

    @overload
    def generate(
        self,
        text: str,
        *,
        stream: Literal[False] = False,
        stop_strings: Sequence[str] = (),
        draft: TextGenerator | None = None,
        **options: Unpack[DecodingOptions],
    ) -> str: ...
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
    @overload
    def generate(
        self,
        text: list[str],
        *,
        stream: Literal[False] = False,
        stop_strings: Sequence[str] = (),
        draft: TextGenerator | None = None,
        **options: Unpack[DecodingOptions],
    ) -> list[str]: ...
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
        from the tokenizer's begin token. stop_strings: an answer ends before the first of them. draft: a
        smaller model that guesses where `speculate` is set. Raises InputError for a text longer than the
        context.
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
        _check_list(texts)
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
        prompts = self._prompts(texts)
        engine = engine_for(self.model, prompts, decoding, None if draft is None else draft.model)
        eos = [] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id]
        answers: dict[tuple[int, int], Completion] = {}
        for prompt in prompts:
            number = engine.submit(Request(prompt, decoding, eos))
            for answer in range(decoding.num_return_sequences):
                answers[number, answer] = Completion(self.tokenizer, stop_strings, (number, answer))

        def pieces() -> Iterator[tuple[Completion, str]]:
            for token in engine.run():
                completion = answers[token.request, token.answer]
                yield completion, completion.push(token)
                if completion.finish == "stop":
                    engine.cancel(token.request, token.answer)
            ends = [completion.finish for completion in answers.values()]
            if full := ends.count("context"):
                context = self.model.config.context
                _warn(f"{full} of {len(ends)} answers ended where the context of {context} tokens was full")

        return pieces()

    def _prompts(self, texts: list[str]) -> list[list[int]]:
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


# ---------------------------------------------------------------- Transformer


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
        limit = _Limit(self.model.config.context, truncate)
        target, eos = self.tokenizer.target, [self.model.config.eos_id]
        done = unfinished = 0
        for window in windows(texts, _characters, batching.WINDOW_CHARACTERS // decoding.num_beams):
            sources = [encoding.ids for encoding in limit.encode(self.tokenizer, window, done)]
            for answer, *_ in generate(self.model, sources, decoding, eos):
                done += 1
                unfinished += answer.finish != "eos"
                yield target.decode(answer.ids)
        limit.warn()
        if unfinished:
            most = min(decoding.max_new_tokens, self.model.config.context)
            _warn(f"{unfinished} of {done} translations were cut at {most} tokens")


# ---------------------------------------------------------------- BERT

TextOrPair = str | tuple[str, str]
"""A text, or two that are read together."""
OneOrPair = TypeVar("OneOrPair", bound=TextOrPair)


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
        _check_top_k(top_k)
        mask = self.tokenizer.mask_id
        if mask is None:
            raise InputError("this tokenizer has no mask token: there is nothing to fill")
        encoding = self.tokenizer.encode(text)
        if (masks := encoding.ids.count(mask)) != 1:
            raise InputError(f"the text has {masks} masks; write {self.tokenizer.token(mask)} exactly once")
        config = self.model.config
        hidden = self.model.features(*self._batch([encoding])).values[encoding.ids.index(mask)]  # (D,)
        logits = self.model.word_logits(hidden).float()  # (V,)
        best = logits.softmax(-1).topk(min(top_k, config.vocab_size))
        found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [Guess(self.tokenizer.token(id), probability) for id, probability in found]

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
        _check_list(texts)
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
            _check_top_k(top_k)
        config = self.model.config
        if config.head not in ("classification", "multi_label"):
            help = "estimate gives its values" if config.head == "regression" else "fine-tune it first"
            raise InputError(f"this model has no classification head but {config.head!r}: {help}")
        several = config.head == "multi_label"
        count = top_k or (len(config.labels) if several else 5)

        def guesses(encodings: list[Encoding]) -> list[list[Guess]]:
            logits = self._class_logits(encodings)  # (N, K)
            return _guesses(logits.sigmoid() if several else logits.softmax(-1), config.labels, count)

        found = self._encoded(texts, truncate, guesses)
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
        _check_list(texts)
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
    def tag(self, texts: str, truncate: bool = False) -> list[TaggedWord]: ...
    @overload
    def tag(self, texts: list[str], truncate: bool = False) -> list[list[TaggedWord]]: ...
    @overload
    def tag(self, texts: Iterator[str], truncate: bool = False) -> Iterator[list[TaggedWord]]: ...
    def tag(
        self, texts: str | list[str] | Iterator[str], truncate: bool = False
    ) -> list[TaggedWord] | list[list[TaggedWord]] | Iterator[list[TaggedWord]]:
        """The tag of each word of a text, or of each of a list of texts; its first piece decides.

        Words are what the tokenizer's pre-tokenizer makes of the text; one that has no token is left out.
        truncate: cut texts longer than the context, with a warning that counts them: what is cut has no
        tags. Raises InputError for such a text otherwise, or if the model has no tagging head.
        """
        if isinstance(texts, str):
            return self.tag([texts], truncate)[0]
        if self.model.config.head != "tagging":
            raise InputError(
                f"this model has no tagging head but {self.model.config.head!r}: fine-tune it first"
            )
        found = self._tagged(texts, truncate)
        return found if isinstance(texts, Iterator) else list(found)

    def _tagged(self, texts: Iterable[str], truncate: bool) -> Iterator[list[TaggedWord]]:
        limit = _Limit(self.model.config.context, truncate)

        def read(window: list[str], first: int) -> list[_Words]:
            spans = [self.tokenizer.word_spans(text) for text in window]
            words = [[text[a:b] for a, b in places] for text, places in zip(window, spans, strict=True)]
            encodings = self.tokenizer.encode_words(words)
            if limit.over([len(e.ids) for e in encodings], first):
                encodings = self.tokenizer.shortened(limit.tokens).encode_words(words)
            return [_Words(*one) for one in zip(window, spans, encodings, strict=True)]

        yield from in_order(
            texts,
            read,
            lambda words: len(words.encoding.ids),
            self._tags,
            _characters,
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
        limit = _Limit(tokens or self.model.config.context, truncate)

        def read(window: list[TextOrPair], first: int) -> list[Encoding]:
            for text in window:
                self.check_parts(1 if isinstance(text, str) else len(text))
            return limit.encode(self.tokenizer, window, first)

        yield from in_order(
            texts, read, lambda e: len(e.ids), answer, _characters, batching.WINDOW_CHARACTERS
        )
        limit.warn()

    def check_parts(self, count: int) -> None:
        """Raise InputError if an input has so many texts, and this model cannot tell two apart."""
        if count > 1 and self.model.config.segments < 2:
            raise InputError("this model does not tell a second text from the first: give single texts")

    def _batch(self, encodings: list[Encoding]) -> tuple[Ragged, Tensor]:
        """Ids and segments, (T,) each."""
        segments = pack((e.segments for e in encodings), self.device)
        return pack((e.ids for e in encodings), self.device), segments.values


# ---------------------------------------------------------------- ViT


class ImageClassifier(Pipeline[ViT]):
    """Names what is in an image."""

    def __call__(self, images: Tensor) -> ViTOutput:
        """The model on normalised images (N, C, height, width)."""
        return cast(ViTOutput, self.model(images.to(self.device)))

    @overload
    def classify(self, images: ImageLike, top_k: int = 5) -> list[Guess]: ...
    @overload
    def classify(self, images: list[AnyImage], top_k: int = 5) -> list[list[Guess]]: ...
    @overload
    def classify(self, images: Iterator[AnyImage], top_k: int = 5) -> Iterator[list[Guess]]: ...
    def classify(
        self, images: ImageLike | list[AnyImage] | Iterator[AnyImage], top_k: int = 5
    ) -> list[Guess] | list[list[Guess]] | Iterator[list[Guess]]:
        """The likeliest classes of an image, or of each of a list; an image can be a path or a file's bytes.

        Raises InputError for an image that cannot be read, or if the model has no head.
        """
        if isinstance(images, ImageLike):
            return self.classify([images], top_k)[0]
        _check_top_k(top_k)
        labels = self.model.config.labels
        if not labels:
            raise InputError("this model has no classification head: fine-tune it first")
        tokens = (self.images.size // self.model.config.patch_size) ** 2 + 1

        def read(window: list[AnyImage], first: int) -> list[Tensor]:
            return [self._pixels(image, first + i) for i, image in enumerate(window)]

        @torch.inference_mode()
        def guesses(batch: list[Tensor]) -> list[list[Guess]]:
            logits = self(torch.stack(batch)).logits
            assert logits is not None  # (N, K)
            return _guesses(logits.float().softmax(-1), labels, top_k)

        # All cost the same, so a window of one batch is as good as a longer one.
        found = in_order(
            images, read, lambda _: tokens, guesses, lambda _: tokens, batching.BATCH_TOKENS - tokens + 1
        )
        return found if isinstance(images, Iterator) else list(found)

    def _pixels(self, image: ImageLike, number: int) -> Tensor:
        """(C, S, S)"""
        try:
            return self.images(image)
        except InputError as error:
            if isinstance(image, str | Path):  # then the error names it
                raise
            raise NumberedError("image", number, f"cannot be used: {error}") from None


# ---------------------------------------------------------------- opening


AnyPipeline = TextGenerator | Encoder | Translator | ImageClassifier


def from_pretrained(
    source: str | Path,
    *,
    head: BertHead | None = None,
    labels: tuple[str, ...] = (),
    revision: str | None = None,
    device: str = "auto",
) -> AnyPipeline:
    """Open a checkpoint, a folder or a hub id, as the pipeline of its family; an adapter, with its base.

    head, labels: give the model a fresh head where the checkpoint has none. revision: a hub id's branch,
    tag or commit. device: "auto" is the GPU if there is one. Raises InputError for what cannot be opened.
    """
    return pipeline(hub.load(source, head=head, labels=labels, revision=revision), device)


def pipeline(checkpoint: Checkpoint, device: str = "auto") -> AnyPipeline:
    """The pipeline of a checkpoint's family, its model moved to the device, which must exist (InputError)."""
    families: dict[type, type[AnyPipeline]] = {
        GPT: TextGenerator,
        Bert: Encoder,
        Transformer: Translator,
        ViT: ImageClassifier,
    }
    return families[type(checkpoint.model)](checkpoint, pick_device(device))


# ---------------------------------------------------------------- shared


class _Words(NamedTuple):
    """A text to tag."""

    text: str
    spans: list[tuple[int, int]]
    encoding: WordEncoding


class _Limit:
    """The most tokens that a text may have, and how many texts had more."""

    def __init__(self, tokens: int, truncate: bool) -> None:
        self.tokens = tokens
        self.truncate = truncate
        self.seen = self.cut = 0

    def encode(self, tokenizer: Tokenizer, texts: Sequence[TextOrPair], first: int) -> list[Encoding]:
        """Each text or pair, cut if it must and may be; the first one has that number among all."""
        encodings = _encode(tokenizer, texts)
        if over := self.over([len(encoding.ids) for encoding in encodings], first):
            shortened = tokenizer.shortened(self.tokens)
            cut = _encode(shortened, [texts[i] for i in over])
            for i, encoding in zip(over, cut, strict=True):
                encodings[i] = encoding
        return encodings

    def over(self, lengths: list[int], first: int) -> list[int]:
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
            _warn(f"{self.cut} of {self.seen} texts were longer than {self.tokens} tokens and were cut")


def _encode(tokenizer: Tokenizer, texts: Sequence[TextOrPair]) -> list[Encoding]:
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


def _characters(text: TextOrPair) -> int:
    return _MARGIN + (len(text) if isinstance(text, str) else sum(map(len, text)))


def _guesses(chances: Tensor, labels: tuple[str, ...], top_k: int) -> list[list[Guess]]:
    """Each row of probabilities (N, K) as its likeliest labels."""
    best = chances.topk(min(top_k, len(labels)))
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [[Guess(labels[k], p) for k, p in zip(classes, chances, strict=True)] for classes, chances in rows]


def _check_top_k(top_k: int) -> None:
    if top_k < 1:
        raise InputError(f"top_k is {top_k}; it must be at least 1")


def _check_list(texts: Any) -> None:
    if isinstance(texts, str):
        raise InputError("give a list of texts, not a single one")


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)
