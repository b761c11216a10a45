"""What a model learns from a batch: named loss terms as sums over counted items.

A step's loss adds the terms, each divided once by its number of items in the whole step, so neither
gradient accumulation nor the number of ranks changes it.

Legend: T tokens of the batch, N sequences, M items of one term, K classes (or vocabulary) of one term.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch.nn.functional as F
from torch import Tensor

from qkv.data.batches import Batch, ImageBatch, LabelledBatch, LanguageBatch, MaskedBatch, PairBatch
from qkv.models import GPT, Bert, Model, Transformer, ViT

B = TypeVar("B", bound=Batch, contravariant=True)


@dataclass(frozen=True)
class Term:
    """One loss: logits (M, K) against labels (M,)."""

    logits: Tensor
    labels: Tensor

    def loss_sum(self, smoothing: float = 0.0) -> Tensor:
        """Sum of the cross-entropies in nats; smoothing as in Szegedy et al. 2016, 7."""
        return F.cross_entropy(self.logits.float(), self.labels, reduction="sum", label_smoothing=smoothing)

    def correct(self) -> Tensor:
        """How many labels have the largest logit."""
        return (self.logits.argmax(-1) == self.labels).sum()


class Objective(Protocol[B]):
    """From a batch to its loss terms."""

    def counts(self, batch: B) -> dict[str, int]:
        """Number of items of each term, known before the model runs."""
        ...

    def terms(self, model: Model, batch: B) -> dict[str, Term]:
        """Run the model; the same names as `counts`."""
        ...


class NextToken:
    """Causal language modelling (Radford et al. 2018, equation 1)."""

    def counts(self, batch: LanguageBatch) -> dict[str, int]:
        """One item a token."""
        return {"next_token": len(batch.labels)}

    def terms(self, model: Model, batch: LanguageBatch) -> dict[str, Term]:
        """Each token's successor."""
        assert isinstance(model, GPT)
        return {"next_token": Term(model(batch.ids).logits.values, batch.labels)}


class MaskedWords:
    """Masked words and next-sentence prediction together (Devlin et al. 2018, 3.1)."""

    def counts(self, batch: MaskedBatch) -> dict[str, int]:
        """One item a selected token and one a pair of segments."""
        return {"masked_word": len(batch.labels), "next_sentence": len(batch.next_labels)}

    def terms(self, model: Model, batch: MaskedBatch) -> dict[str, Term]:
        """Vocabulary logits are computed for the selected tokens only."""
        assert isinstance(model, Bert) and model.next_sentence is not None
        hidden = model.features(batch.ids, batch.segments)
        words = model.word_logits(hidden.values[batch.selected])
        following = model.next_sentence(model.pool(hidden))
        return {"masked_word": Term(words, batch.labels), "next_sentence": Term(following, batch.next_labels)}


class TextClass:
    """The class of a text or of a pair of texts (Devlin et al. 2018, 4.1)."""

    def counts(self, batch: LabelledBatch) -> dict[str, int]:
        """One item a text."""
        return {"label": len(batch.labels)}

    def terms(self, model: Model, batch: LabelledBatch) -> dict[str, Term]:
        """Logits of the classification head."""
        assert isinstance(model, Bert)
        logits = model(batch.ids, batch.segments).class_logits
        assert logits is not None
        return {"label": Term(logits, batch.labels)}


class ImageClass:
    """The class of an image (Dosovitskiy et al. 2021, 3.1)."""

    def counts(self, batch: ImageBatch) -> dict[str, int]:
        """One item an image."""
        return {"label": len(batch.labels)}

    def terms(self, model: Model, batch: ImageBatch) -> dict[str, Term]:
        """Logits of the classification head."""
        assert isinstance(model, ViT)
        return {"label": Term(model.head(model.features(batch.images)), batch.labels)}


class NextTargetToken:
    """Sequence to sequence: the target's tokens, given the source (Vaswani et al. 2017, 5)."""

    def counts(self, batch: PairBatch) -> dict[str, int]:
        """One item a target token."""
        return {"target_token": len(batch.labels)}

    def terms(self, model: Model, batch: PairBatch) -> dict[str, Term]:
        """Each target token's successor."""
        assert isinstance(model, Transformer)
        return {"target_token": Term(model(batch.source, batch.inputs).logits.values, batch.labels)}


def objective_for(batch: type[Batch]) -> Objective[Batch]:
    """The objective that learns from this kind of batch."""
    objectives: dict[type[Batch], Objective[Batch]] = {
        LanguageBatch: NextToken(),
        MaskedBatch: MaskedWords(),
        LabelledBatch: TextClass(),
        PairBatch: NextTargetToken(),
        ImageBatch: ImageClass(),
    }
    return objectives[batch]
