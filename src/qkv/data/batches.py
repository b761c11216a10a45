"""What the objectives are given: one kind of batch for each way to learn.

Legend: T tokens of the batch, N sequences or images, M selected tokens or words (or raw images),
K labels or classes, C channels, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from qkv.ragged import Ragged


@dataclass(frozen=True, eq=False)
class Batch:
    """Tensors and ragged sequences that belong together."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device, ready for the model."""
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})


@dataclass(frozen=True, eq=False)
class LanguageBatch(Batch):
    """Token ids (T,) and each one's successor (T,)."""

    ids: Ragged
    labels: Tensor


@dataclass(frozen=True, eq=False)
class MaskedBatch(Batch):
    """Pairs of segments in which tokens were hidden."""

    ids: Ragged
    """(T,): [CLS] A [SEP] B [SEP] with most of the selected tokens replaced."""
    segments: Tensor
    """(T,): 0 up to the first [SEP], 1 behind it."""
    selected: Tensor
    """(M,): rows of the tokens to predict."""
    labels: Tensor
    """(M,): what the selected tokens were."""
    next_labels: Tensor
    """(N,): 0 if B follows A, 1 if B is from another document."""


@dataclass(frozen=True, eq=False)
class TextBatch(Batch):
    """Texts, or pairs of texts, that something belongs to: token ids (T,) with their segments (T,)."""

    ids: Ragged
    segments: Tensor


@dataclass(frozen=True, eq=False)
class LabelledBatch(TextBatch):
    """The class (N,) of each text."""

    labels: Tensor


@dataclass(frozen=True, eq=False)
class MultiLabelBatch(TextBatch):
    """Which labels each text has: bool (N, K)."""

    labels: Tensor


@dataclass(frozen=True, eq=False)
class ValueBatch(TextBatch):
    """The value (N,) of each text."""

    values: Tensor


@dataclass(frozen=True, eq=False)
class TaggedBatch(Batch):
    """Sentences whose words have tags."""

    ids: Ragged
    """(T,)"""
    first: Tensor
    """(M,): rows of the first piece of each word."""
    labels: Ragged
    """(M,): the tag of each word; N sentences."""


@dataclass(frozen=True, eq=False)
class ContrastiveBatch(Batch):
    """Texts, each with another that is to be found among those of its group."""

    ids: Ragged
    """(T,): N texts, then the N texts that belong to them."""
    wrong: Tensor
    """(N, N): whether, for text i, the other text j is a wrong answer; neither that nor right is ignored."""
    temperature: Tensor
    """(): divides the cosines."""


@dataclass(frozen=True, eq=False)
class TaskBatch(Batch):
    """A batch of one of several tasks."""

    task: str
    batch: Batch

    def to(self, device: torch.device | str) -> TaskBatch:
        """The task's batch on that device."""
        return replace(self, batch=self.batch.to(device))


@dataclass(frozen=True, eq=False)
class PairBatch(Batch):
    """Source ids (S,), the target ids (T,) that the decoder reads, and each one's successor (T,)."""

    source: Ragged
    inputs: Ragged
    labels: Tensor


@dataclass(frozen=True, eq=False)
class ImageBatch(Batch):
    """Normalised images (N, C, height, width) and their classes (N,), or each one's probabilities (N, K)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class RawImageBatch(Batch):
    """Pixels from which the device that trains makes the images of a batch."""

    pixels: Tensor
    """uint8 (M, C, S, S); there may be more than the batch has images."""
    labels: Tensor
    """(N,) or (N, K), as an ImageBatch has them."""
    finish: Callable[[Tensor], Tensor]
    """From `pixels` to normalised images (N, C, S, S)."""

    def to(self, device: torch.device | str) -> ImageBatch:
        """The finished images on that device."""
        return ImageBatch(self.finish(self.pixels.to(device)), self.labels.to(device))
