"""From what people give, a pipeline with a text or an image, to the subject of an explanation.

Legend: U units, N variants of the input, D model width, C choices, K possible answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.config import BEAMS, BertHead, Decoding
from qkv.decode import generate
from qkv.errors import InputError
from qkv.explanations import units
from qkv.explanations.explanation import Outcome, Picture, Units
from qkv.explanations.subjects import (
    BertSubject,
    GPTSubject,
    Question,
    Reading,
    Subject,
    TransformerSubject,
    ViTSubject,
    at_units,
)
from qkv.models.bert import SEQUENCE
from qkv.pipelines import AnyPipeline, Encoder, ImageClassifier, ImageLike, TextGenerator, Translator
from qkv.ragged import Layout

Input = ImageLike | tuple[str, str]
"""A text, two texts, or an image."""


def subject_of(pipeline: AnyPipeline, input: Input, target: str | None, max_new_tokens: int) -> Subject:
    """What is to be explained. Raises InputError for what the model cannot be asked, or its answer not be."""
    if isinstance(pipeline, ImageClassifier):
        if isinstance(input, tuple):
            raise InputError("this model classifies one image: give an image or its path")
        return _image(pipeline, input, target)
    if isinstance(pipeline, Encoder):
        texts = (input,) if isinstance(input, str) else input
        if not isinstance(texts, tuple) or [type(text) for text in texts] not in ([str], [str, str]):
            raise InputError("this model reads text: give a text, or two in a tuple")
        return _encoded(pipeline, texts, target)
    if not isinstance(input, str):
        raise InputError("this model reads one text: give a text")
    if isinstance(pipeline, TextGenerator):
        return _continued(pipeline, input, target, max_new_tokens)
    return _translated(pipeline, input, target)


# ---------------------------------------------------------------- BERT


def _encoded(encoder: Encoder, texts: tuple[str, ...], target: str | None) -> Subject:
    head = encoder.model.config.head
    if head == "tagging":
        return _tagged(encoder, texts, target)
    if head in SEQUENCE:
        return _classified(encoder, texts, target)
    if encoder.model.words is not None:
        return _filled(encoder, texts, target)
    return _compared(encoder, texts, target)


def _classified(encoder: Encoder, texts: tuple[str, ...], target: str | None) -> Subject:
    """The class, label or value of a text or pair."""
    model, labels = encoder.model, encoder.model.config.labels
    outcomes: dict[BertHead, Outcome] = {"multi_label": "label", "regression": "value"}

    def head(state: Tensor, questions: Sequence[Question]) -> Tensor:
        return model.class_logits(state[:, 0])[:, None].expand(-1, len(questions), -1)

    reading = Reading(head, len(labels), labels.__getitem__, outcomes.get(model.config.head, "class"))
    encoding = _encoding(encoder, texts)
    subject = _bert(encoder, units.of_encoding("text", texts, encoding), [encoding], reading)
    subject.ask([subject.question("text", 0)], [_label(labels, target)])
    return subject


def _filled(encoder: Encoder, texts: tuple[str, ...], target: str | None) -> Subject:
    """The words that were hidden."""
    tokenizer, model = encoder.tokenizer, encoder.model
    encoding = _encoding(encoder, texts)
    masks = [unit for unit, id in enumerate(encoding.ids) if id == tokenizer.mask_id]
    if not masks:
        mask = tokenizer.special.get("mask")
        raise InputError(f"this model fills masks: write {mask} where a word is to be explained")
    if target is not None and len(masks) > 1:
        raise InputError(f"a target is for one mask, but the text has {len(masks)}")
    wanted = None if target is None else tokenizer.backend.token_to_id(target)
    if target is not None and wanted is None:
        raise InputError(f"{target!r} is no single token of this model; a mask is filled by one")
    reading = Reading(
        lambda state, questions: model.word_logits(at_units(state, questions)),
        model.config.vocab_size,
        tokenizer.token,
    )
    subject = _bert(encoder, units.of_encoding("text", texts, encoding), [encoding], reading)
    subject.ask([subject.question("text", unit) for unit in masks], [wanted] * len(masks))
    return subject


def _tagged(encoder: Encoder, texts: tuple[str, ...], target: str | None) -> Subject:
    """The tags of words; target: those of this word alone, or the words that have this tag."""
    if len(texts) > 1:
        raise InputError("a tagger reads one text")
    model, (text,), labels = encoder.model, texts, encoder.model.config.labels
    spans = encoder.tokenizer.word_spans(text)
    words = [text[start:end] for start, end in spans]
    encoding = encoder.tokenizer.backend.encode(words, is_pretokenized=True)
    _check_length(encoder, len(encoding.ids))
    first = {word: unit for unit, word in reversed(list(enumerate(encoding.word_ids))) if word is not None}
    if not first:
        raise InputError("the text has no words to tag")
    reading = Reading(
        lambda state, questions: model.tag_logits(at_units(state, questions)),
        len(labels),
        labels.__getitem__,
    )
    subject = _bert(encoder, units.of_words("text", text, spans, encoding), [encoding], reading)
    asked = {word: subject.question("text", unit) for word, unit in sorted(first.items())}
    subject.ask(list(asked.values()), [None] * len(asked))
    if target is not None:
        named = zip(asked, subject.questions, strict=True)
        subject.questions = [q for word, q in named if target in (words[word], labels[q.answer])]
        if not subject.questions:
            raise InputError(f"no word of the text is {target!r}, and none is tagged so")
    return subject


def _compared(encoder: Encoder, texts: tuple[str, ...], target: str | None) -> Subject:
    """How similar the vectors of two texts are, each read by itself: their cosine, asked of each text.

    The other one stays as it is: two texts of which nothing is left are alike.
    """
    if len(texts) != 2:
        raise InputError("this model makes vectors of texts: give two, whose similarity is explained")
    if target is not None:
        raise InputError("a similarity has no target")
    first, limit = encoder.pooling.mode == "cls", encoder.pooling.max_tokens
    encodings = [_encoding(encoder, (text,), limit) for text in texts]
    sizes = [len(encoding.ids) for encoding in encodings]

    def head(state: Tensor, questions: Sequence[Question]) -> Tensor:
        parts = torch.split(state, sizes, dim=1)  # (N, units of a text, D)
        one, other = (part[:, 0] if first else part.mean(1) for part in parts)
        return F.cosine_similarity(one, other)[:, None, None].expand(-1, len(questions), 1)

    both = [units.of_encoding("text", (text,), e) for text, e in zip(texts, encodings, strict=True)]
    reading = Reading(head, 1, lambda _: "similarity", "value")
    subject = _bert(encoder, units.joined(*both), encodings, reading)
    questions = []
    text = Layout(tuple(sizes), encoder.device).owner  # (U,)
    for number, start in enumerate((0, sizes[0])):
        question, own = subject.question("text", start), text == number
        reads = question.reads if first else own.to(question.reads) / own.sum()
        questions.append(replace(question, reads=reads, candidates=own))
    subject.ask(questions, [0, 0])
    return subject


def _bert(
    encoder: Encoder, sequence: Units, encodings: Sequence[tokenizers.Encoding], reading: Reading
) -> BertSubject:
    """Texts, each of which is read by itself; the sequence has the units of all."""
    if encoder.tokenizer.mask_id is None:
        raise InputError("this tokenizer has no mask token, which stands for what is taken away")
    ids, segments = (
        torch.tensor([x for one in parts for x in one], device=encoder.device)
        for parts in zip(*((e.ids, e.type_ids) for e in encodings), strict=True)
    )
    lengths = tuple(len(encoding.ids) for encoding in encodings)
    return BertSubject(encoder.model, sequence, ids, segments, lengths, encoder.tokenizer.mask_id, reading)


def _encoding(encoder: Encoder, texts: tuple[str, ...], limit: int | None = None) -> tokenizers.Encoding:
    encoder.check_parts(len(texts))
    encoding = encoder.tokenizer.located(*texts)
    _check_length(encoder, len(encoding.ids), limit=limit)
    return encoding


def _check_length(pipeline: AnyPipeline, tokens: int, kind: str = "text", limit: int | None = None) -> None:
    """Raise InputError for more tokens than the limit; None: than the model's context."""
    most = limit or cast(int, pipeline.model.config.context)  # type: ignore[union-attr]
    if tokens > most:
        raise InputError(f"the {kind} has {tokens} tokens; this model reads at most {most}: shorten it")


def _label(labels: tuple[str, ...], target: str | None) -> int | None:
    if target is None:
        return None
    if target not in labels:
        raise InputError(f"this model has no label {target!r}; it has {', '.join(labels)}")
    return labels.index(target)


# ---------------------------------------------------------------- GPT and Transformer


def _continued(generator: TextGenerator, text: str, target: str | None, max_new_tokens: int) -> Subject:
    """The tokens behind a text: those that the model finds likeliest, or the target's."""
    tokenizer, model = generator.tokenizer, generator.model
    prompt = tokenizer.encode(text).ids
    _check_length(generator, len(prompt))
    special = [False] * len(prompt)
    if not prompt:
        if tokenizer.bos_id is None:
            raise InputError("an empty text has nothing to continue, and this tokenizer has no begin token")
        prompt, special = [tokenizer.bos_id], [True]
    if target is None:
        greedy = Decoding(max_new_tokens=max_new_tokens, temperature=0.0)
        written = generate(model, [prompt], greedy, generator.eos)[0][0].ids
    else:
        written = _given(tokenizer.plain(target))
    read = [*prompt, *written[:-1]]
    _check_length(generator, len(read))
    special += [False] * (len(read) - len(prompt))
    sequence = units.of_ids("text", tokenizer, read, special)
    ids = torch.tensor(read, device=generator.device)
    subject = GPTSubject(model, sequence, ids, partial(units.written, tokenizer))
    places = range(len(prompt) - 1, len(read))
    subject.ask([subject.question("text", unit, causal=True) for unit in places], written)
    return subject


def _given(target: list[int]) -> list[int]:
    """A target's tokens. Raises InputError if there are none."""
    if not target:
        raise InputError("the target is empty: give the text that is to be explained")
    return target


def _translated(translator: Translator, text: str, target: str | None) -> Subject:
    """Each token of the model's own translation, or of the target."""
    tokenizer, model, config = translator.tokenizer, translator.model, translator.model.config
    source = tokenizer.encode(text).ids
    _check_length(translator, len(source), "source")
    sequence = units.of_text("source", tokenizer, source, *tokenizer.placed(text))
    if target is None:
        best = Decoding(num_beams=BEAMS, temperature=0.0, max_new_tokens=config.context)
        written = generate(model, [source], best, [config.eos_id])[0][0].ids
        read = [config.pad_id, *written[:-1]]
        answer = units.of_ids("target", tokenizer.target, read, [True, *[False] * (len(read) - 1)])
    else:
        written = [*_given(tokenizer.target.plain(target)), config.eos_id]
        read = [config.pad_id, *written[:-1]]
        _check_length(translator, len(read), "target")
        target, places = tokenizer.target.placed(target, literal=True)
        answer = units.of_text("target", tokenizer, read, target, [None, *places])
    sequences = [sequence, answer]
    ids = [torch.tensor(one, device=translator.device) for one in (source, read)]
    subject = TransformerSubject(model, sequences, ids, partial(units.written, tokenizer.target))
    subject.ask([subject.question("target", unit, causal=True) for unit in range(len(read))], written)
    return subject


# ---------------------------------------------------------------- ViT


def _image(classifier: ImageClassifier, image: ImageLike, target: str | None) -> Subject:
    """The class of an image."""
    model, labels = classifier.model, classifier.model.config.labels
    if not labels:
        raise InputError("this model has no classification head: fine-tune it first")
    pixels = classifier.images.pixels(image)  # (channels, height, width)
    rows, columns = (side // model.config.patch_size for side in pixels.shape[1:])
    normalised = classifier.images.normalize(pixels).to(model.class_token)
    subject = ViTSubject(model, units.of_patches(rows, columns), normalised, labels.__getitem__)
    shown = pixels.expand(3, -1, -1).permute(1, 2, 0)
    subject.picture = Picture(np.ascontiguousarray(shown.numpy()), (rows, columns))
    subject.ask([subject.question("image", 0)], [_label(labels, target)])
    return subject
