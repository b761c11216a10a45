"""Data: from files to datasets of samples, and from these to batches."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np

from qkv.config import (
    AugmentConfig,
    BertConfig,
    Family,
    GPTConfig,
    RunConfig,
    TokenizerConfig,
    TransformerConfig,
    ViTConfig,
)
from qkv.data.augment import Augmentation
from qkv.data.cache import NO_CACHE, Cache, Chunks, fingerprint
from qkv.data.dataset import TOKENIZERS, Dataset, digest
from qkv.data.documents import MaskedDataset
from qkv.data.images import ImageDataset
from qkv.data.labelled import LabelledDataset
from qkv.data.pairs import PairDataset
from qkv.data.prefetch import prefetch
from qkv.data.raw import SPLIT_SEED, Raw, Samples, read, read_held_out
from qkv.data.sampler import Sampler
from qkv.data.text import LanguageDataset
from qkv.errors import InputError
from qkv.images import ImageProcessor
from qkv.tokenizers import Tokenizer, train_tokenizer

__all__ = [
    "Cache",
    "Dataset",
    "Raw",
    "Sampler",
    "Samples",
    "build",
    "prefetch",
    "prepare",
    "read",
    "read_held_out",
    "trained_tokenizer",
]


def prepare(
    raw: Raw,
    config: RunConfig,
    tokenizer: Tokenizer | None,
    images: ImageProcessor | None,
    cache: Cache = NO_CACHE,
) -> tuple[Dataset, Dataset]:
    """What the configured model trains on, and what it is scored on; prepared data are kept in the cache.

    Raises InputError for samples that the model cannot take: too long, broken, or with other labels.
    """
    known = getattr(config.model, "labels", ())
    if raw.labels != known:
        raise InputError(
            f"the data have the labels {', '.join(raw.labels)}, but the model {', '.join(known)}"
        )
    train = build(raw.train, config, tokenizer, images, training=True, cache=cache)
    valid = build(raw.valid, config, tokenizer, images, training=False, cache=cache)
    if cache.problem:
        train.notes = (*train.notes, cache.problem)
    return train, valid


def trained_tokenizer(
    config: TokenizerConfig, family: Family, raw: Raw, cache: Cache = NO_CACHE
) -> Tokenizer:
    """`train_tokenizer` on the training text, unless the cache has its answer from an earlier run."""
    columns = (raw.train.documents, raw.train.pairs)
    total = sum(len(text) for column in columns for text in column)

    def texts() -> Iterator[str]:
        done = 0
        for text in raw.texts():
            yield text
            done += len(text)
            cache.watch("characters read for the tokenizer", done, total)

    def chunks() -> Chunks:
        made = json.dumps(train_tokenizer(config, family, texts()).to_json()).encode()
        yield 1, {"json": np.frombuffer(made, np.uint8)}

    content = [digest(column)[0] for column in columns]
    made_from = fingerprint("tokenizer", repr(config), family, *content)
    found = cache.get(made_from, TOKENIZERS, chunks, "tokenizer trained", 1)
    return Tokenizer.from_json(json.loads(found["json"].tobytes()))


def build(
    samples: Samples,
    config: RunConfig,
    tokenizer: Tokenizer | None,
    images: ImageProcessor | None,
    training: bool = False,
    cache: Cache = NO_CACHE,
) -> Dataset:
    """Samples as the configured model takes them. Raises InputError for those that it cannot take."""
    model, truncate = config.model, config.data.truncate
    seed = config.train.seed if training else SPLIT_SEED  # runs with different seeds compare
    if isinstance(model, ViTConfig):
        if images is None:
            raise InputError("the checkpoint has no preprocessor_config.json: how are images to be prepared?")
        varied = training and config.augment != AugmentConfig()
        augmentation = Augmentation(config.augment, images, len(model.labels), seed) if varied else None
        return ImageDataset(samples.images, samples.labels, images, model.patch_size, cache, augmentation)
    if tokenizer is None:
        raise InputError("the checkpoint has no tokenizer: it cannot read text; add its tokenizer.json")
    match model:
        case GPTConfig():
            return LanguageDataset(samples.documents, tokenizer, model.context, seed, training, cache)
        case TransformerConfig():
            return PairDataset(
                samples.texts,
                samples.pairs,
                tokenizer,
                start_id=model.pad_id,
                end_id=model.eos_id,
                context=model.context,
                truncate=truncate,
                cache=cache,
            )
        case BertConfig():
            if samples.kind == "text":
                return MaskedDataset(samples.texts, tokenizer, model.context, seed, cache)
            return LabelledDataset(
                samples.texts, samples.pairs, samples.labels, tokenizer, model.context, truncate, cache
            )
