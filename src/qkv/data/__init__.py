"""Data: from files to datasets of samples, and from these to batches."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain

import numpy as np

from qkv.config import (
    AugmentConfig,
    BertConfig,
    DataConfig,
    Family,
    GPTConfig,
    RunConfig,
    TokenizerConfig,
    TransformerConfig,
    ViTConfig,
)
from qkv.data.augment import Augmentation
from qkv.data.batches import MultiLabelBatch, ValueBatch
from qkv.data.bpe_dropout import BPEDropout
from qkv.data.cache import NO_CACHE, Cache, Chunks, fingerprint
from qkv.data.contrastive import ContrastiveDataset
from qkv.data.dataset import TOKENIZERS, Dataset, digest
from qkv.data.documents import SELECTED, MaskedDataset
from qkv.data.images import ImageDataset
from qkv.data.labelled import LabelledDataset, label_matrix
from qkv.data.multitask import MultiTaskDataset
from qkv.data.pairs import PairDataset
from qkv.data.prefetch import prefetch
from qkv.data.raw import SPLIT_SEED, Kind, Raw, Samples, bert_head, read, read_held_out
from qkv.data.sampler import Sampler
from qkv.data.tagged import TaggedDataset
from qkv.data.text import LanguageDataset
from qkv.errors import InputError
from qkv.images import ImageProcessor
from qkv.tokenizers import Tokenizer, train_tokenizer

__all__ = [
    "Cache",
    "Dataset",
    "MultiTaskDataset",
    "Raw",
    "Sampler",
    "Samples",
    "bert_head",
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
    check_settings(raw.kind, config)
    check_labels(raw, getattr(config.model, "labels", ()))
    train = build(raw.train, config, tokenizer, images, training=True, cache=cache)
    valid = build(raw.valid, config, tokenizer, images, training=False, cache=cache)
    if cache.problem:
        train.notes = (*train.notes, cache.problem)
    return train, valid


def check_labels(raw: Raw, labels: tuple[str, ...]) -> None:
    """Raise InputError for data with other labels than a model's, which number its answers."""
    if raw.labels != labels:
        raise InputError(
            f"the data have the labels {', '.join(raw.labels)}, but the model {', '.join(labels)}"
        )


def trained_tokenizer(
    config: TokenizerConfig, family: Family, raws: Sequence[Raw], cache: Cache = NO_CACHE
) -> Tokenizer:
    """`train_tokenizer` on all training text, unless the cache has its answer from an earlier run."""
    columns = [column for raw in raws for column in raw.train.columns]
    total = sum(len(text) for column in columns for text in column)

    def texts() -> Iterator[str]:
        done = 0
        for text in chain.from_iterable(raw.texts() for raw in raws):
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


def check_settings(kind: Kind, config: RunConfig) -> None:
    """Raise InputError for settings that would do nothing for such data, or do not go together."""
    if (config.model.family, kind) != ("bert", "text"):
        for name in ("whole_words", "masked_share"):
            if getattr(config.data, name) != getattr(DataConfig, name):
                raise InputError(f"data.{name} is for masked language modelling: leave it out")
    if kind != "contrastive" and config.data.candidates != DataConfig.candidates:
        raise InputError("data.candidates is for contrastive learning: leave it out")
    if config.data.bpe_dropout and config.model.family not in ("gpt", "transformer"):
        raise InputError("data.bpe_dropout is for gpt and transformer: leave it out")
    if config.train.torch_compile and (config.data.bpe_dropout or kind == "contrastive"):
        what = "data.bpe_dropout" if config.data.bpe_dropout else "contrastive learning"
        raise InputError(f"train.torch_compile needs samples of equal length: leave it out with {what}")
    for name in ("label_smoothing_factor", "r_drop"):
        if getattr(config.train, name) and kind in ("regression", "contrastive"):
            raise InputError(f"train.{name} is for classes, not for {kind}: leave it out")
    if config.train.r_drop and not _has_dropout(config):
        raise InputError(
            "train.r_drop compares two passes that only dropout tells apart: set model.dropout above 0"
        )


def _has_dropout(config: RunConfig) -> bool:
    """Whether two passes of training differ."""
    adapters = config.lora.dropout if config.lora.rank else 0.0
    return any((*config.model.dropouts.values(), adapters))


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
    rate = config.data.bpe_dropout if training else 0.0
    dropout = BPEDropout(tokenizer, rate) if rate else None
    match model:
        case GPTConfig():
            return LanguageDataset(
                samples.documents, tokenizer, model.context, seed, training, cache, dropout
            )
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
                dropout=dropout,
                seed=seed,
            )
        case BertConfig():
            share = config.data.masked_share if training else SELECTED
            return _for_bert(samples, config, model, tokenizer, seed, share, cache)


def _for_bert(
    samples: Samples,
    config: RunConfig,
    model: BertConfig,
    tokenizer: Tokenizer,
    seed: int,
    masked_share: float,
    cache: Cache,
) -> Dataset:
    """What BERT learns each task from."""
    data, context = config.data, model.context
    labelled = partial(
        LabelledDataset,
        samples.texts,
        samples.pairs,
        tokenizer=tokenizer,
        context=context,
        truncate=data.truncate,
        cache=cache,
    )
    match samples.kind:
        case "text":
            return MaskedDataset(
                samples.texts, tokenizer, context, seed, cache, data.whole_words, masked_share
            )
        case "multi_label":
            matrix = label_matrix(samples.label_sets, len(model.labels))
            return labelled(matrix, make=MultiLabelBatch)
        case "regression":
            return labelled(np.array(samples.values, dtype=np.float32), make=ValueBatch)
        case "tagging":
            return TaggedDataset(samples.words, samples.tags, tokenizer, context, data.truncate, cache)
        case "contrastive":
            if not samples.pairs and not _has_dropout(config):
                raise InputError(
                    "contrastive learning without a second text compares a text with itself under another "
                    "dropout: set model.dropout above 0"
                )
            return ContrastiveDataset(
                samples.texts,
                samples.pairs,
                tokenizer,
                context=context,
                truncate=data.truncate,
                candidates=data.candidates,
                temperature=config.train.temperature,
                seed=seed,
                cache=cache,
            )
        case _:
            return labelled(samples.labels)
