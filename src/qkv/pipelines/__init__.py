"""Trained models in use: text or images in, answers out.

`from_pretrained` opens a checkpoint as the pipeline of its family. Pipelines only translate between
what people read and what models read: tokens and pixels are made by the checkpoint's own tokenizer
and image processor, answers by the model and the decoding engine. A list gives as many answers, and where
there may be more inputs than memory holds, an iterator gives an iterator, which reads ahead no more than
`batching` says.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Literal

from qkv import hub
from qkv.config import BertHead, Family, InferencePrecision
from qkv.hub import Checkpoint
from qkv.models.bert import Bert
from qkv.models.gpt import GPT
from qkv.models.transformer import Transformer
from qkv.models.vit import ViT
from qkv.pipelines.base import Guess, NumberedError, Pipeline
from qkv.pipelines.classifier import ImageClassifier, ImageLike
from qkv.pipelines.encoder import Encoder, TaggedWord
from qkv.pipelines.generator import DecodingOptions, TextGenerator
from qkv.pipelines.translator import Translator
from qkv.runtime import pick_device
from qkv.unread import Unread

__all__ = [
    "AnyPipeline",
    "DecodingOptions",
    "Encoder",
    "Guess",
    "ImageClassifier",
    "ImageLike",
    "NumberedError",
    "Pipeline",
    "TaggedWord",
    "TextGenerator",
    "Translator",
    "from_pretrained",
    "pipeline",
]

AnyPipeline = TextGenerator | Encoder | Translator | ImageClassifier


def from_pretrained(
    source: str | Path,
    *,
    families: Collection[Family] = (),
    head: BertHead | None = None,
    labels: tuple[str, ...] = (),
    revision: str | None = None,
    device: str = "auto",
    precision: InferencePrecision | Literal["auto"] | None = None,
) -> AnyPipeline:
    """Open a checkpoint, a folder or a hub id, as the pipeline of its family; an adapter, with its base.

    families: the only ones that will do; (): all. head, labels: give the model a fresh head where the
    checkpoint has none. revision: a hub id's branch, tag or commit. device: "auto" is the GPU if there is
    one. precision: make the model answer faster, as `Pipeline.optimize` does, but in less memory: on a CPU
    each block's weights are packed as they are read (an adapter's base is read whole). Raises InputError
    for what cannot be opened, and as `qkv.fast.optimize` does.
    """
    opened = hub.opened(source, families=families, head=head, labels=labels, revision=revision)
    with opened as (checkpoint, unread):
        return pipeline(checkpoint, device, precision, unread)


def pipeline(
    checkpoint: Checkpoint,
    device: str = "auto",
    precision: InferencePrecision | Literal["auto"] | None = None,
    unread: Unread | None = None,
) -> AnyPipeline:
    """The pipeline of a checkpoint's family, its model moved to the device, which must exist (InputError).

    precision: as for `from_pretrained`. unread: what the model still waits for, as `hub.opened` gives it.
    """
    place = pick_device(device)
    if unread is not None and (precision is None or place.type != "cpu"):
        unread.into(checkpoint.model)
    families: dict[type, type[AnyPipeline]] = {
        GPT: TextGenerator,
        Bert: Encoder,
        Transformer: Translator,
        ViT: ImageClassifier,
    }
    made = families[type(checkpoint.model)](checkpoint, place)
    return made if precision is None else made.optimize(precision, unread)
