"""Trained models in use: text or images in, answers out.

`from_pretrained` opens a checkpoint as the pipeline of its family. Pipelines only translate between
what people read and what models read: tokens and pixels are made by the checkpoint's own tokenizer
and image processor, answers by the model and the decoding engine.

Legend: T tokens of a batch, N inputs, D model width, V vocabulary, K classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypedDict, TypeVar, Unpack, cast, overload

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from qkv import hub
from qkv.attention import Attention
from qkv.completion import Completion
from qkv.config import BertHead
from qkv.decode import Decoding, engine_for, generate
from qkv.errors import InputError
from qkv.hub import Checkpoint
from qkv.images import ImageProcessor
from qkv.models.bert import Bert, BertOutput
from qkv.models.gpt import GPT, GPTOutput
from qkv.models.transformer import Transformer, TransformerOutput
from qkv.models.vit import ViT, ViTOutput
from qkv.ragged import Ragged, pack
from qkv.runtime import pick_device
from qkv.search import Request
from qkv.tokenizers import Encoding, Tokenizer

BATCH_TOKENS = 4096
"""Most tokens that a pipeline gives a model at once; an input larger than that goes alone."""

M = TypeVar("M", bound=Transformer | Bert | GPT | ViT)

ImageLike = Image.Image | str | Path | bytes
"""An image, its path, or its file's bytes."""
AnyImage = TypeVar("AnyImage", bound=ImageLike)
OneOrMany = TypeVar("OneOrMany", str, list[str])
"""A text or a list of texts; the answer is of the same type."""


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


class Pipeline(Generic[M]):
    """A model with what prepares its input. Calling it is calling the model, on its device."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.model: M = cast(M, checkpoint.model.to(device).eval())

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

    def attentions(self) -> dict[str, list[Attention]]:
        """The model's attention modules, so that `qkv.record` takes a pipeline."""
        return self.model.attentions()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the checkpoint as a Hugging Face folder. Raises InputError if it cannot be written."""
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
        return [answer.text for answer in self._complete(text, decoding, stop_strings, draft)]

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
        return self._complete(texts, Decoding(**options), stop_strings, draft)

    def _complete(
        self,
        texts: list[str],
        decoding: Decoding,
        stop_strings: Sequence[str],
        draft: TextGenerator | None,
    ) -> list[Completion]:
        _check_list(texts)
        found = dict.fromkeys(c for c, _ in self._decode(texts, decoding, stop_strings, draft))
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
        num_beams: int = 4,
        length_penalty: float = 1.0,
        max_new_tokens: int | None = None,
        truncate: bool = False,
    ) -> OneOrMany:
        """The likeliest translation of a text, or of each text of a list; num_beams=1 is greedy.

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
        given = [texts] if isinstance(texts, str) else texts
        sources = _encode(self.tokenizer, given, context, truncate)
        ids = [source.ids for source in sources]
        found = [answer for answer, *_ in generate(self.model, ids, decoding, [self.model.config.eos_id])]
        if unfinished := sum(answer.finish != "eos" for answer in found):
            _warn(f"{unfinished} of {len(found)} translations were cut at {decoding.max_new_tokens} tokens")
        target = self.tokenizer.target
        answers = [target.decode(answer.ids) for answer in found]
        return answers[0] if isinstance(texts, str) else answers


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

    @torch.inference_mode()
    def embed(self, texts: list[str], truncate: bool = False) -> NDArray[np.float32]:
        """One vector a text, (N, D): the mean over its tokens, unless the checkpoint says otherwise.

        truncate: cut texts longer than the checkpoint's `max_tokens`, or else the context, with a warning
        that counts them. Raises InputError for such a text otherwise.
        """
        _check_list(texts)
        config = self.model.config
        limit = self.checkpoint.max_tokens or config.context
        encodings = _encode(self.tokenizer, texts, limit, truncate)
        vectors = np.empty((len(texts), config.dim), dtype=np.float32)
        for indices in _batches([len(e.ids) for e in encodings]):
            hidden = self.model.features(*self._batch([encodings[i] for i in indices]))
            pooled = (hidden.first() if self.checkpoint.pooling == "cls" else hidden.mean()).float()  # (N, D)
            vectors[indices] = (F.normalize(pooled) if self.checkpoint.normalize else pooled).cpu().numpy()
        return vectors

    @overload
    def classify(
        self, texts: TextOrPair, top_k: int | None = None, truncate: bool = False
    ) -> list[Guess]: ...
    @overload
    def classify(
        self, texts: list[OneOrPair], top_k: int | None = None, truncate: bool = False
    ) -> list[list[Guess]]: ...
    def classify(
        self, texts: TextOrPair | list[OneOrPair], top_k: int | None = None, truncate: bool = False
    ) -> list[Guess] | list[list[Guess]]:
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
        if config.head == "classification":
            chances = self._class_logits(texts, truncate).softmax(-1)  # (N, K)
            return _guesses(chances, config.labels, 5 if top_k is None else top_k)
        if config.head == "multi_label":
            chances = self._class_logits(texts, truncate).sigmoid()  # (N, K)
            return _guesses(chances, config.labels, len(config.labels) if top_k is None else top_k)
        help = "estimate gives its values" if config.head == "regression" else "fine-tune it first"
        raise InputError(f"this model has no classification head but {config.head!r}: {help}")

    def estimate(self, texts: Sequence[TextOrPair], truncate: bool = False) -> NDArray[np.float32]:
        """The values of texts or pairs, (N, K): K is 1 for models trained here.

        truncate: cut texts longer than the context, with a warning that counts them. Raises InputError
        for such a text otherwise, or if the model has no regression head.
        """
        _check_list(texts)
        if self.model.config.head != "regression":
            raise InputError(f"this model has no regression head but {self.model.config.head!r}")
        return self._class_logits(texts, truncate).numpy()

    @torch.inference_mode()
    def _class_logits(self, texts: Sequence[TextOrPair], truncate: bool) -> Tensor:
        """float32 (N, K), on the CPU."""
        encodings = _encode(self.tokenizer, texts, self.model.config.context, truncate)
        logits = torch.empty(len(texts), len(self.model.config.labels))
        for indices in _batches([len(e.ids) for e in encodings]):
            hidden = self.model.features(*self._batch([encodings[i] for i in indices]))
            logits[indices] = self.model.class_logits(hidden).float().cpu()
        return logits

    @overload
    def tag(self, texts: str, truncate: bool = False) -> list[TaggedWord]: ...
    @overload
    def tag(self, texts: list[str], truncate: bool = False) -> list[list[TaggedWord]]: ...
    @torch.inference_mode()
    def tag(
        self, texts: str | list[str], truncate: bool = False
    ) -> list[TaggedWord] | list[list[TaggedWord]]:
        """The tag of each word of a text, or of each of a list of texts; its first piece decides.

        Words are what the tokenizer's pre-tokenizer makes of the text; one that has no token is left out.
        truncate: cut texts longer than the context, with a warning that counts them: what is cut has no
        tags. Raises InputError for such a text otherwise, or if the model has no tagging head.
        """
        if isinstance(texts, str):
            return self.tag([texts], truncate)[0]
        config = self.model.config
        if config.head != "tagging":
            raise InputError(f"this model has no tagging head but {config.head!r}: fine-tune it first")
        spans = [self.tokenizer.word_spans(text) for text in texts]
        words = [[text[a:b] for a, b in places] for text, places in zip(texts, spans, strict=True)]
        encodings = self.tokenizer.encode_words(words)
        if _check_lengths([len(e.ids) for e in encodings], config.context, truncate):
            encodings = self.tokenizer.shortened(config.context).encode_words(words)
        tagged: dict[int, list[TaggedWord]] = {}
        for indices in _batches([len(e.ids) for e in encodings]):
            hidden = self.model.features(pack((encodings[i].ids for i in indices), self.device))
            for i, states in zip(indices, hidden.split(), strict=True):  # states: (L, D)
                found = [(*span, place) for span, place in zip(spans[i], encodings[i].first, strict=True)]
                read = [(start, end, place) for start, end, place in found if place is not None]
                logits = self.model.tag_logits(states[[place for *_, place in read]])  # (M, K)
                best = logits.float().softmax(-1).max(-1)
                tagged[i] = [
                    TaggedWord(texts[i][start:end], config.labels[k], chance, start, end)
                    for (start, end, _), k, chance in zip(
                        read, best.indices.tolist(), best.values.tolist(), strict=True
                    )
                ]
        return [tagged[i] for i in range(len(texts))]

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
    @torch.inference_mode()
    def classify(self, images: ImageLike | list[AnyImage], top_k: int = 5) -> list[Guess] | list[list[Guess]]:
        """The likeliest classes of an image, or of each of a list; an image can be a path or a file's bytes.

        Raises InputError for an image that cannot be read, or if the model has no head.
        """
        if isinstance(images, ImageLike):
            return self.classify([images], top_k)[0]
        _check_top_k(top_k)
        if not self.model.config.labels:
            raise InputError("this model has no classification head: fine-tune it first")
        tokens = (self.images.size // self.model.config.patch_size) ** 2 + 1
        guesses: list[list[Guess]] = []
        for indices in _batches([tokens] * len(images)):
            logits = self(torch.stack([self.images(images[i]) for i in indices])).logits
            assert logits is not None  # (N, K)
            guesses += _guesses(logits.float().softmax(-1), self.model.config.labels, top_k)
        return guesses


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


def _batches(costs: Sequence[int]) -> Iterator[list[int]]:
    """Indices of inputs in batches of at most BATCH_TOKENS; the costliest come first, alike ones together."""
    batch: list[int] = []
    room = BATCH_TOKENS
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        if batch and costs[i] > room:
            yield batch
            batch, room = [], BATCH_TOKENS
        batch.append(i)
        room -= costs[i]
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, texts: Sequence[TextOrPair], limit: int, truncate: bool) -> list[Encoding]:
    """Each text or pair, cut to the limit. Raises InputError for one over it unless it may be cut."""
    parts = [(text,) if isinstance(text, str) else text for text in texts]
    encodings = [tokenizer.encode(*part) for part in parts]
    if over := _check_lengths([len(encoding.ids) for encoding in encodings], limit, truncate):
        shortened = tokenizer.shortened(limit)
        for i in over:
            encodings[i] = shortened.encode(*parts[i])
    return encodings


def _check_lengths(lengths: list[int], limit: int, truncate: bool) -> list[int]:
    """Which texts are over the limit, with a warning. Raises InputError if these may not be cut."""
    over = [i for i, length in enumerate(lengths) if length > limit]
    if over and not truncate:
        i = lengths.index(max(lengths))
        raise InputError(
            f"text {i} has {lengths[i]} tokens; the limit is {limit}: "
            "shorten it, or in Python pass truncate=True to cut it"
        )
    if over:
        _warn(f"{len(over)} of {len(lengths)} texts were longer than {limit} tokens and were cut")
    return over


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
