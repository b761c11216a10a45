"""What a model learns from a batch: named loss terms as sums over counted items.

A step's loss adds the terms, each divided once by its number of items in the whole step, so neither
gradient accumulation nor the number of ranks changes it.

Legend: T tokens of the batch, N sequences, M items of one term, K classes (or vocabulary) of one term.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from qkv.data.batches import (
    Batch,
    ImageBatch,
    LabelledBatch,
    LanguageBatch,
    MaskedBatch,
    PairBatch,
    RawImageBatch,
)
from qkv.models import GPT, Bert, Model, Transformer, ViT


@dataclass(frozen=True)
class Term:
    """One loss: logits (M, K) against labels (M,), or against probabilities of classes (M, K)."""

    logits: Tensor
    labels: Tensor

    def loss_sum(self, smoothing: float = 0.0) -> Tensor:
        """Sum of the cross-entropies in nats; smoothing as in Szegedy et al. 2016, 7."""
        return F.cross_entropy(self.logits.float(), self.labels, reduction="sum", label_smoothing=smoothing)

    def correct(self) -> Tensor:
        """How many labels, the likeliest where they are probabilities, have the largest logit."""
        labels = self.labels if self.labels.dim() == 1 else self.labels.argmax(-1)
        return (self.logits.argmax(-1) == labels).sum()


def item_counts(batch: Batch) -> dict[str, int]:
    """The number of items M of each term of `loss_terms`, known before the model runs."""
    match batch:
        case LanguageBatch():
            return {"next_token": len(batch.labels)}
        case MaskedBatch():
            return {"masked_word": len(batch.labels), "next_sentence": len(batch.next_labels)}
        case PairBatch():
            return {"target_token": len(batch.labels)}
        case LabelledBatch() | ImageBatch() | RawImageBatch():
            return {"label": len(batch.labels)}
        case _:
            raise TypeError(f"no objective learns from a {type(batch).__name__}")


def loss_terms(model: Model, batch: Batch) -> dict[str, Term]:
    """Run the model on a batch of its kind.

    next_token: causal language modelling (Radford et al. 2018, equation 1).
    masked_word and next_sentence: BERT's two tasks together (Devlin et al. 2018, 3.1).
    target_token: sequence to sequence, given the source (Vaswani et al. 2017, 5).
    label: the class of a text or a pair (Devlin et al. 2018, 4.1) or of an image (Dosovitskiy et al.
    2021, 3.1).
    """
    match model, batch:
        case GPT(), LanguageBatch():
            return {"next_token": Term(model(batch.ids).logits.values, batch.labels)}
        case Bert(), MaskedBatch():
            hidden = model.features(batch.ids, batch.segments)
            words = model.word_logits(hidden.values[batch.selected])  # (M, V): of the selected tokens only
            follows = model.next_logits(hidden)  # (N, 2)
            return {
                "masked_word": Term(words, batch.labels),
                "next_sentence": Term(follows, batch.next_labels),
            }
        case Bert(), LabelledBatch():
            return {
                "label": Term(model.class_logits(model.features(batch.ids, batch.segments)), batch.labels)
            }
        case Transformer(), PairBatch():
            return {"target_token": Term(model(batch.source, batch.inputs).logits.values, batch.labels)}
        case ViT(), ImageBatch():
            return {"label": Term(model.head(model.features(batch.images)), batch.labels)}
        case _:
            raise TypeError(f"a {type(model).__name__} does not learn from a {type(batch).__name__}")
