"""Data: from files to datasets of samples, and from these to batches."""

from __future__ import annotations

from functools import partial

import numpy as np

from qkv.config import BertConfig, GPTConfig, RunConfig, TransformerConfig, ViTConfig
from qkv.data.batches import MultiLabelBatch, ValueBatch
from qkv.data.bpe_dropout import BPEDropout
from qkv.data.contrastive import ContrastiveDataset
from qkv.data.dataset import Dataset
from qkv.data.documents import MaskedDataset
from qkv.data.images import ImageDataset
from qkv.data.labelled import LabelledDataset, label_matrix
from qkv.data.pairs import PairDataset
from qkv.data.raw import SPLIT_SEED, Kind, Raw, Samples, bert_head, read, read_held_out
from qkv.data.sampler import Sampler
from qkv.data.tagged import TaggedDataset
from qkv.data.text import LanguageDataset
from qkv.errors import InputError
from qkv.images import ImageProcessor
from qkv.tokenizers import Tokenizer

__all__ = [
    "Dataset",
    "Raw",
    "Sampler",
    "Samples",
    "bert_head",
    "build",
    "prepare",
    "read",
    "read_held_out",
]


def prepare(
    raw: Raw, config: RunConfig, tokenizer: Tokenizer | None, images: ImageProcessor | None
) -> tuple[Dataset, Dataset]:
    """What the configured model trains on, and what it is scored on.

    Raises InputError for samples that the model cannot take: too long, broken, or with other labels.
    """
    _check_settings(raw.kind, config)
    known = getattr(config.model, "labels", ())
    if raw.labels != known:
        raise InputError(
            f"the data have the labels {', '.join(raw.labels)}, but the model {', '.join(known)}"
        )
    train = build(raw.train, config, tokenizer, images, training=True)
    return train, build(raw.valid, config, tokenizer, images, training=False)


def _check_settings(kind: Kind, config: RunConfig) -> None:
    """Raise InputError for settings that would do nothing for such data."""
    if config.data.whole_words and (config.model.family, kind) != ("bert", "text"):
        raise InputError("data.whole_words is for masked language modelling: leave it out")
    if config.data.bpe_dropout and config.model.family not in ("gpt", "transformer"):
        raise InputError("data.bpe_dropout is for gpt and transformer: leave it out")
    if config.train.label_smoothing_factor and kind in ("regression", "contrastive"):
        raise InputError(f"train.label_smoothing_factor is for classes, not for {kind}: leave it out")


def build(
    samples: Samples,
    config: RunConfig,
    tokenizer: Tokenizer | None,
    images: ImageProcessor | None,
    training: bool = False,
) -> Dataset:
    """Samples as the configured model takes them. Raises InputError for those that it cannot take."""
    model, truncate = config.model, config.data.truncate
    seed = config.train.seed if training else SPLIT_SEED  # runs with different seeds compare
    if isinstance(model, ViTConfig):
        if images is None:
            raise InputError("the checkpoint has no preprocessor_config.json: how are images to be prepared?")
        return ImageDataset(samples.images, samples.labels, images, model.patch_size)
    if tokenizer is None:
        raise InputError("the checkpoint has no tokenizer: it cannot read text; add its tokenizer.json")
    rate = config.data.bpe_dropout if training else 0.0
    dropout = BPEDropout(tokenizer, rate) if rate else None
    match model:
        case GPTConfig():
            return LanguageDataset(samples.texts, tokenizer, model.context, seed, training, dropout)
        case TransformerConfig():
            return PairDataset(
                samples.texts,
                samples.pairs,
                tokenizer,
                start_id=model.pad_id,
                end_id=model.eos_id,
                context=model.context,
                truncate=truncate,
                dropout=dropout,
                seed=seed,
            )
        case BertConfig():
            return _for_bert(samples, config, model, tokenizer, seed)


def _for_bert(
    samples: Samples, config: RunConfig, model: BertConfig, tokenizer: Tokenizer, seed: int
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
    )
    match samples.kind:
        case "text":
            return MaskedDataset(samples.texts, tokenizer, context, seed, data.whole_words)
        case "multi_label":
            matrix = label_matrix(samples.label_sets, len(model.labels))
            return labelled(matrix, make=MultiLabelBatch)
        case "regression":
            return labelled(np.array(samples.values, dtype=np.float32), make=ValueBatch)
        case "tagging":
            return TaggedDataset(samples.words, samples.tags, tokenizer, context, data.truncate)
        case "contrastive":
            if not samples.pairs and model.dropout == model.attention_dropout == 0:
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
            )
        case _:
            return labelled(samples.labels)
