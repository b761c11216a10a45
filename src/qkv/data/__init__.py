"""Data: from files to datasets of samples, and from these to batches."""

from __future__ import annotations

from qkv.config import AugmentConfig, BertConfig, GPTConfig, RunConfig, TransformerConfig, ViTConfig
from qkv.data.augment import Augmentation
from qkv.data.dataset import Dataset
from qkv.data.documents import MaskedDataset
from qkv.data.images import ImageDataset
from qkv.data.labelled import LabelledDataset
from qkv.data.pairs import PairDataset
from qkv.data.raw import SPLIT_SEED, Raw, Samples, read, read_held_out
from qkv.data.sampler import Sampler
from qkv.data.text import LanguageDataset
from qkv.errors import InputError
from qkv.images import ImageProcessor
from qkv.tokenizers import Tokenizer

__all__ = ["Dataset", "Raw", "Sampler", "Samples", "build", "prepare", "read", "read_held_out"]


def prepare(
    raw: Raw, config: RunConfig, tokenizer: Tokenizer | None, images: ImageProcessor | None
) -> tuple[Dataset, Dataset]:
    """What the configured model trains on, and what it is scored on.

    Raises InputError for samples that the model cannot take: too long, broken, or with other labels.
    """
    known = getattr(config.model, "labels", ())
    if raw.labels != known:
        raise InputError(
            f"the data have the labels {', '.join(raw.labels)}, but the model {', '.join(known)}"
        )
    train = build(raw.train, config, tokenizer, images, training=True)
    return train, build(raw.valid, config, tokenizer, images, training=False)


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
        varied = training and config.augment != AugmentConfig()
        augmentation = Augmentation(config.augment, images, len(model.labels), seed) if varied else None
        return ImageDataset(samples.images, samples.labels, images, model.patch_size, augmentation)
    if tokenizer is None:
        raise InputError("the checkpoint has no tokenizer: it cannot read text; add its tokenizer.json")
    match model:
        case GPTConfig():
            return LanguageDataset(samples.texts, tokenizer, model.context, seed, training)
        case TransformerConfig():
            return PairDataset(
                samples.texts,
                samples.pairs,
                tokenizer,
                start_id=model.pad_id,
                end_id=model.eos_id,
                context=model.context,
                truncate=truncate,
            )
        case BertConfig():
            if samples.kind == "text":
                return MaskedDataset(samples.texts, tokenizer, model.context, seed)
            return LabelledDataset(
                samples.texts, samples.pairs, samples.labels, tokenizer, model.context, truncate
            )
