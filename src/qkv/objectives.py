"""What a model learns from a batch: named loss terms as sums over counted items.

A step's loss adds the terms, each divided once by its number of items in the whole step, so neither
gradient accumulation nor the number of ranks changes it.

Legend: T tokens of the batch, N sequences, M items of one term, K classes (or vocabulary) of one term.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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

    def divergence_sum(self, other: Term) -> Tensor:
        """Sum of KL(p||q) + KL(q||p), p and q the distributions of this term and of `other`, in nats."""
        p, q = (term.logits.float().log_softmax(-1) for term in (self, other))  # (M, K)
        return ((p.exp() - q.exp()) * (p - q)).sum()


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


class Objective(nn.Module):
    """A model with what it learns: the one module that training runs, compiles, and spreads over ranks."""

    def __init__(self, model: Model, smoothing: float = 0.0, r_drop: float = 0.0) -> None:
        """smoothing: of labels. r_drop: weight of the divergence between two passes under dropout."""
        super().__init__()
        self.model = model
        self.smoothing = smoothing
        self.r_drop = r_drop

    def forward(self, batch: Batch, counts: Mapping[str, int]) -> Tensor:
        """The batch's share of a step's loss: each term's sum over the step's number of items.

        With r_drop half of equation 4 of Liang et al. 2021, so that the loss keeps its scale: the mean of
        two passes, plus r_drop / 4 times their divergence in both directions.
        """
        terms = self.terms(batch)
        sums = {name: term.loss_sum(self.smoothing) for name, term in terms.items()}
        if self.r_drop:
            for name, again in self.terms(batch).items():
                mean = (sums[name] + again.loss_sum(self.smoothing)) / 2
                sums[name] = mean + self.r_drop / 4 * terms[name].divergence_sum(again)
        return torch.stack([total / counts[name] for name, total in sums.items()]).sum()

    def terms(self, batch: Batch) -> dict[str, Term]:
        """The loss terms of a batch, for scoring."""
        return loss_terms(self.model, batch)
