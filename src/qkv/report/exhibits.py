"""What a model in training makes of a few held-out samples: asked at every evaluation, shown in the report.

An exhibit asks through the pipelines that people use, greedily or with a seed of its own, so it draws
nothing from the generators that training draws from. Answers are plain values, kept in samples.jsonl.

Legend: S side of an image in pixels, C channels, R side of its thumbnail.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from html import escape
from itertools import accumulate, islice
from typing import Any, Generic, TypeVar

import numpy as np
from PIL import Image

from qkv.config import BertConfig, GPTConfig, TransformerConfig, ViTConfig
from qkv.data import Samples
from qkv.hub import Checkpoint
from qkv.images import ImageProcessor
from qkv.pipelines import AnyPipeline, Encoder, ImageClassifier, TextGenerator, Translator
from qkv.report.page import continuation, filled, framed, table
from qkv.report.pictures import gallery

Answer = dict[str, Any]
"""Plain values by name, as JSON has them."""

P = TypeVar("P", bound=AnyPipeline)

_TOKENS = 64
"""Most tokens of a text that is generated, and of its prompt a quarter: it shows enough and is soon done."""
_SIDE = 72
"""Most pixels of a picture's side."""
_CHARACTERS = 240
"""Longer texts are shown in part."""


class Exhibit(ABC, Generic[P]):
    """Some samples, and how a model answers them."""

    title: str
    caption: str

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    @abstractmethod
    def ask(self, pipeline: P) -> list[Answer]:
        """The model's answers now, one a sample."""

    @abstractmethod
    def show(self, answers: Sequence[Answer]) -> str:
        """The same as HTML."""


def exhibit(checkpoint: Checkpoint, samples: Samples, labels: tuple[str, ...]) -> Exhibit[Any] | None:
    """What suits a model and its data; None if nothing does. labels: names of the samples' classes."""
    model = checkpoint.model.config
    match model, samples.kind:
        case GPTConfig(), "text":
            return Continuations(samples)
        case TransformerConfig(), "pairs":
            return Translations(samples.spread(6))
        case BertConfig(), "text":
            return Gaps(samples)
        case BertConfig(), "classification":
            return Classes(samples.spread(8), labels)
        case BertConfig(), "tagging":
            return Tags(samples.spread(4), labels)
        case ViTConfig(), "images" if checkpoint.images is not None:
            return Pictures(samples, labels, checkpoint.images)
        case _:
            return None


class Continuations(Exhibit[TextGenerator]):
    """How a GPT goes on behind beginnings of held-out text."""

    title = "It goes on"
    caption = (
        "Held-out text, and marked what the model puts behind it, sampled from the likeliest 95 % (top-p)."
    )

    def ask(self, pipeline: TextGenerator) -> list[Answer]:
        """A continuation of each prompt."""
        room, prompts = min(_TOKENS, pipeline.model.config.context // 2), list(self._prompts(pipeline))
        texts = pipeline.generate(prompts, max_new_tokens=room, temperature=0.8, top_p=0.95, seed=0)
        return [{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)]

    def _prompts(self, pipeline: TextGenerator) -> Iterator[str]:
        """A few tokens from three places, each behind a line break if one is near."""
        context, tokenizer = pipeline.model.config.context, pipeline.tokenizer
        # Of documents that are too large for memory the beginnings are enough.
        large = [next(file.parts()) for file in self.samples.files[:3]]
        whole = "\n".join(large or self.samples.texts)
        for start in (len(whole) * i // 3 for i in range(3)):
            line = whole.find("\n", start, start + 2000) + 1
            ids = tokenizer.plain(whole[line or start :][:1000])
            prompt = tokenizer.decode(ids[: min(_TOKENS, context) // 4])
            if prompt and len(tokenizer.encode(prompt).ids) < context:  # it may have more tokens on its own
                yield prompt

    def show(self, answers: Sequence[Answer]) -> str:
        """Prompts with their continuations marked."""
        return "".join(continuation(a["prompt"], a["text"]) for a in answers)


class Translations(Exhibit[Translator]):
    """Held-out sources translated."""

    title = "It translates"
    caption = "Held-out sources, translated greedily."

    def ask(self, pipeline: Translator) -> list[Answer]:
        """One translation a source."""
        room = min(_TOKENS, pipeline.model.config.context)
        texts = pipeline.translate(self.samples.texts, num_beams=1, max_new_tokens=room, truncate=True)
        rows = zip(self.samples.texts, self.samples.pairs, texts, strict=True)
        return [{"source": s, "reference": r, "translation": t} for s, r, t in rows]

    def show(self, answers: Sequence[Answer]) -> str:
        """Beside the references."""
        rows = [[_short(a[name]) for name in ("source", "reference", "translation")] for a in answers]
        return table(("source", "reference", "translation"), rows)


class Gaps(Exhibit[Encoder]):
    """Words hidden in held-out sentences."""

    title = "It fills gaps"
    caption = (
        "A word of each held-out sentence is hidden: what the text says, and what the model finds likeliest."
    )

    def ask(self, pipeline: Encoder) -> list[Answer]:
        """Four gaps."""
        tokenizer = pipeline.tokenizer
        assert tokenizer.mask_id is not None  # pre-training needs it
        mask = tokenizer.token(tokenizer.mask_id)
        found = self._gaps(pipeline, mask, tokenizer.mask_id)
        return [
            {
                "before": before,
                "after": after,
                "truth": truth,
                "guesses": pipeline.fill(f"{before}{mask}{after}", top_k=4),
            }
            for before, truth, after in islice(found, 4)
        ]

    def _gaps(self, pipeline: Encoder, mask: str, mask_id: int) -> Iterator[tuple[str, str, str]]:
        """Before, in and behind the longest word of each document's first line that is a single token."""
        tokenizer, context = pipeline.tokenizer, pipeline.model.config.context
        for text in self.samples.texts:
            line = text.partition("\n")[0]
            whole = tokenizer.encode(line).ids
            if mask in line or len(whole) > context:
                continue
            for word in sorted(re.finditer(r"\w+", line), key=lambda word: -len(word[0])):
                before, after = line[: word.start()], line[word.end() :]
                ids = tokenizer.encode(f"{before}{mask}{after}").ids
                at = ids.index(mask_id)
                same = len(ids) == len(whole) and whole == [*ids[:at], whole[at], *ids[at + 1 :]]
                if same and whole[at] != tokenizer.unk_id:
                    yield before, tokenizer.token(whole[at]), after
                    break

    def show(self, answers: Sequence[Answer]) -> str:
        """Sentences with the truth, and guesses with their probabilities."""
        return "".join(filled(a["before"], a["after"], a["guesses"], a["truth"]) for a in answers)


class Classes(Exhibit[Encoder]):
    """Held-out texts, or pairs of texts, classified."""

    title = "It classifies"
    caption = "Held-out texts with their labels."

    def __init__(self, samples: Samples, labels: tuple[str, ...]) -> None:
        super().__init__(samples)
        self.labels = [labels[i] for i in samples.labels]

    def ask(self, pipeline: Encoder) -> list[Answer]:
        """The likeliest class of each."""
        texts, pairs = self.samples.texts, self.samples.pairs
        given: list[Any] = list(zip(texts, pairs, strict=True)) if pairs else texts
        guesses = pipeline.classify(given, top_k=1, truncate=True)
        shown = [" | ".join(text) for text in given] if pairs else texts
        return [
            {"text": text, "label": label, "guess": guess.name, "probability": guess.probability}
            for text, label, (guess,) in zip(shown, self.labels, guesses, strict=True)
        ]

    def show(self, answers: Sequence[Answer]) -> str:
        """A table; wrong answers are marked."""
        rows = (
            f"<tr><td>{escape(_short(a['text']))}</td><td>{escape(a['label'])}</td>"
            f'<td class="{"right" if a["guess"] == a["label"] else "wrong"}">{escape(a["guess"])} '
            f"({100 * a['probability']:.0f} %)</td></tr>"
            for a in answers
        )
        return framed(("text", "label", "model says"), rows)


class Tags(Exhibit[Encoder]):
    """Words of held-out sentences tagged."""

    title = "It tags"
    caption = "Held-out sentences with the tags of their words, and below these what the model says."

    def __init__(self, samples: Samples, labels: tuple[str, ...]) -> None:
        super().__init__(samples)
        self.tags = [[labels[i] for i in row] for row in samples.tags]

    def ask(self, pipeline: Encoder) -> list[Answer]:
        """A tag for each word; an empty one where the model reads no word that begins there."""
        sentences = self.samples.words
        found = pipeline.tag([tuple(words) for words in sentences], truncate=True)
        answers = []
        for words, tags, said in zip(sentences, self.tags, found, strict=True):
            by_place = {word.start: word.tag for word in said}
            places = accumulate((len(word) + 1 for word in words[:-1]), initial=0)
            guesses = [by_place.get(place, "") for place in places]
            answers.append({"words": words, "tags": tags, "guesses": guesses})
        return answers

    def show(self, answers: Sequence[Answer]) -> str:
        """A table a sentence; wrong answers are marked."""
        tables = []
        for a in answers:
            tags = "".join(f"<td>{escape(tag)}</td>" for tag in a["tags"])
            guesses = "".join(
                f'<td class="{"right" if guess == tag else "wrong"}">{escape(guess or "–")}</td>'
                for guess, tag in zip(a["guesses"], a["tags"], strict=True)
            )
            tables.append(framed(map(escape, a["words"]), (f"<tr>{tags}</tr>", f"<tr>{guesses}</tr>")))
        return "".join(tables)


class Pictures(Exhibit[ImageClassifier]):
    """Held-out images classified."""

    title = "It recognises"
    caption = "Held-out images, as the model is given them; in red what it gets wrong."

    def __init__(self, samples: Samples, labels: tuple[str, ...], processor: ImageProcessor) -> None:
        super().__init__(samples)
        self.labels = [labels[i] for i in samples.labels]
        self.processor = processor

    def ask(self, pipeline: ImageClassifier) -> list[Answer]:
        """The likeliest class of each."""
        guesses = pipeline.classify([image.source for image in self.samples.images], top_k=1)
        return [
            {"label": label, "guess": guess.name, "probability": guess.probability}
            for label, (guess,) in zip(self.labels, guesses, strict=True)
        ]

    def show(self, answers: Sequence[Answer]) -> str:
        """The images with what they are taken for."""
        pictures = []
        for pixels, answer in zip(self.thumbnails, answers, strict=True):
            guess, label = answer["guess"], answer["label"]
            said = guess if guess == label else f"{guess}, is {label}"
            pictures.append((pixels, said, guess == label))
        return gallery(pictures)

    @cached_property
    def thumbnails(self) -> list[np.ndarray]:
        """uint8 (R, R) or (R, R, 3) each, of few pixels: the page has them once an evaluation."""
        found = []
        for image in self.samples.images:
            pixels = image.pixels(self.processor).permute(1, 2, 0).numpy()  # (S, S, C)
            picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
            picture.thumbnail((_SIDE, _SIDE))
            found.append(np.asarray(picture))
        return found


def _short(text: str) -> str:
    return text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]} …"
