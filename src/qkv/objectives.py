"""What a model learns from a batch: named loss terms as sums over counted items.

A step's loss adds the terms, each divided once by its number of items in the whole step, so neither
gradient accumulation nor the number of ranks changes it.

Legend: T tokens of the batch, N sequences, D model width, M items of one term, K classes (or vocabulary)
or labels of one term.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.data.batches import (
    Batch,
    ContrastiveBatch,
    ImageBatch,
    LabelledBatch,
    LanguageBatch,
    MaskedBatch,
    MultiLabelBatch,
    PairBatch,
    RawImageBatch,
    TaggedBatch,
    TaskBatch,
    ValueBatch,
)
from qkv.models import GPT, Bert, Model, MultiTaskBert, Transformer, ViT

# ---------------------------------------------------------------- kinds of loss


@dataclass(frozen=True, eq=False)
class Term(ABC):
    """One loss of M items: what the model said, and what is right."""

    logits: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """M."""
        return len(self.labels)

    @abstractmethod
    def loss_sum(self, smoothing: float = 0.0) -> Tensor:
        """The sum of the items' losses; smoothing: of labels, where the loss knows it."""

    @abstractmethod
    def predictions(self) -> Tensor:
        """The model's answers, in the form of the labels."""

    def correct(self) -> Tensor | None:
        """How many answers are right; None where answers are only more or less so."""
        return (self.predictions() == self.labels).sum()

    def divergence_sum(self, other: Term) -> Tensor:
        """Sum of KL(p||q) + KL(q||p), p and q the distributions of this term and of `other`, in nats.

        Raises TypeError for losses whose answers are no distributions.
        """
        raise TypeError(f"the answers of {type(self).__name__} are no distributions")


class CrossEntropy(Term):
    """One of K classes: logits (M, K); labels (M,), or probabilities (M, K)."""

    def loss_sum(self, smoothing: float = 0.0) -> Tensor:
        """In nats; smoothing as in Szegedy et al. 2016, 7."""
        if self.labels.dim() == 1:
            loss: Tensor = _CrossEntropySum.apply(self.logits, self.labels, smoothing)  # type: ignore[no-untyped-call]
            return loss
        return F.cross_entropy(self.logits.float(), self.labels, reduction="sum", label_smoothing=smoothing)

    def predictions(self) -> Tensor:
        """The class of the largest logit, (M,)."""
        return self.logits.argmax(-1)

    def correct(self) -> Tensor:
        """How many labels, or most probable ones, have the largest logit."""
        labels = self.labels if self.labels.dim() == 1 else self.labels.argmax(-1)
        return (self.predictions() == labels).sum()

    def divergence_sum(self, other: Term) -> Tensor:
        """Of the M distributions over classes."""
        divergence: Tensor = _DivergenceSum.apply(self.logits, other.logits)  # type: ignore[no-untyped-call]
        return divergence


class _CrossEntropySum(torch.autograd.Function):
    """Cross-entropy that makes its gradient together with the loss, some rows at a time.

    It keeps the gradient, in the type of the logits, and nothing else: neither float32 logits nor their
    log-probabilities, which for a large vocabulary are most of a step's memory.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        """logits (M, K), labels (M,) -> the sum of the losses."""
        K = logits.shape[1]
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), device=logits.device)
        for rows in _slices(logits):
            label = labels[rows, None]  # (m, 1)
            log_p = logits[rows].float().log_softmax(-1)  # (m, K)
            total -= (1 - smoothing) * log_p.gather(1, label).sum()
            if smoothing:
                total -= smoothing / K * log_p.sum()
            if gradient is not None:
                # softmax - targets (Szegedy et al. 2016, 7)
                p = log_p.exp_().sub_(smoothing / K)
                gradient[rows] = p.scatter_add_(1, label, torch.full_like(p[:, :1], smoothing - 1))
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        """The gradient kept, times that of the sum."""
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None


class _DivergenceSum(torch.autograd.Function):
    """KL(p||q) + KL(q||p) of softmax distributions, which keeps only its gradients, as `_CrossEntropySum`."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        """a, b: logits (M, K) of p and q -> the sum over the M pairs."""
        gradients = torch.empty_like(a), torch.empty_like(b)
        total = torch.zeros((), device=a.device)
        for rows in _slices(a):
            log_p, log_q = (logits[rows].float().log_softmax(-1) for logits in (a, b))  # (m, K)
            ratio = log_p - log_q
            p, q = log_p.exp_(), log_q.exp_()
            forwards, backwards = p * ratio, -q * ratio
            p_to_q, q_to_p = forwards.sum(-1, keepdim=True), backwards.sum(-1, keepdim=True)  # (m, 1)
            total += (p_to_q + q_to_p).sum()
            # For a: KL(p||q) gives p (log p/q - KL(p||q)), and KL(q||p) gives p - q; for b the reverse.
            difference = p - q
            gradients[0][rows] = forwards.addcmul_(p, p_to_q, value=-1).add_(difference)
            gradients[1][rows] = backwards.addcmul_(q, q_to_p, value=-1).sub_(difference)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients kept, times that of the sum."""
        a, b = (gradient * upstream[0].to(gradient.dtype) for gradient in ctx.saved_tensors)
        return a, b


_CPU_ELEMENTS, _GPU_ELEMENTS = 1 << 18, 1 << 27
"""Logits treated at a time: on a CPU as many as its caches hold."""


def _slices(logits: Tensor) -> Iterator[slice]:
    """Rows of logits (M, K) to treat at a time."""
    elements = _CPU_ELEMENTS if logits.device.type == "cpu" else _GPU_ELEMENTS
    step = max(1, elements // logits.shape[1])
    return (slice(start, start + step) for start in range(0, len(logits), step))


class BinaryCrossEntropy(Term):
    """K labels, each of which may hold: logits (N, K) and labels bool (N, K), whose M = N K are the items."""

    def __len__(self) -> int:
        return self.labels.numel()

    def loss_sum(self, smoothing: float = 0.0) -> Tensor:
        """In nats; smoothing moves each label towards one half."""
        labels = self.labels.float() * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(self.logits.float(), labels, reduction="sum")

    def predictions(self) -> Tensor:
        """The labels that are more probable than not, bool (N, K)."""
        return self.logits > 0

    def divergence_sum(self, other: Term) -> Tensor:
        """Of the N K distributions, each over yes and no."""
        p, q = (term.logits.float() for term in (self, other))  # (N, K)
        return ((p.sigmoid() - q.sigmoid()) * (p - q)).sum()


class SquaredError(Term):
    """A value: logits (M, 1) and labels (M,)."""

    def loss_sum(self, smoothing: float = 0.0) -> Tensor:
        """In squares of the value's unit."""
        return F.mse_loss(self.predictions(), self.labels, reduction="sum")

    def predictions(self) -> Tensor:
        """The values, (M,)."""
        return self.logits.float().squeeze(-1)

    def correct(self) -> None:
        """Values are near or far."""
        return


def contrastive(vectors: Tensor, batch: ContrastiveBatch) -> CrossEntropy:
    """Which text belongs to which, by vectors (2 N, D): InfoNCE (van den Oord et al. 2018, equation 4).

    The logits (N, N) are cosines over the temperature (Gao et al. 2021, equation 1), -inf where texts are not
    compared.
    """
    texts, pairs = F.normalize(vectors.float()).chunk(2)  # (N, D)
    right = torch.arange(len(texts), device=vectors.device)
    compared = batch.wrong | torch.eye(len(texts), dtype=torch.bool, device=vectors.device)  # (N, N)
    # Cosines in bfloat16 are too coarse to be divided by the temperature. The meta device has no autocast.
    device = vectors.device.type
    known = torch.amp.is_autocast_available(device)
    with torch.autocast(device, enabled=False) if known else nullcontext():
        similarities = texts @ pairs.T / batch.temperature
    return CrossEntropy(similarities.masked_fill(~compared, -torch.inf), right)


# ---------------------------------------------------------------- from a batch to its losses


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
        case MultiLabelBatch():
            return {"labels": batch.labels.numel()}
        case ValueBatch():
            return {"value": len(batch.values)}
        case TaggedBatch():
            return {"tag": len(batch.labels.values)}
        case ContrastiveBatch():
            return {"pair": len(batch.wrong)}
        case TaskBatch():
            return {f"{batch.task}/{name}": count for name, count in item_counts(batch.batch).items()}
        case _:
            raise TypeError(f"no objective learns from a {type(batch).__name__}")


def loss_terms(model: Model, batch: Batch) -> dict[str, Term]:
    """Run the model on a batch of its kind.

    next_token: causal language modelling (Radford et al. 2018, equation 1).
    masked_word and next_sentence: BERT's two tasks together (Devlin et al. 2018, 3.1).
    target_token: sequence to sequence, given the source (Vaswani et al. 2017, 5).
    label: the class of a text or a pair (Devlin et al. 2018, 4.1) or of an image (Dosovitskiy et al.
    2021, 3.1). labels: which labels a text has. value: a number of a text or a pair.
    tag: the class of a word, by its first piece (Devlin et al. 2018, 5.3).
    pair: which text belongs to a text, by the cosine of mean vectors (Gao et al. 2021, equations 1 and 4).
    A task's terms are called task/term.
    """
    match model, batch:
        case GPT(), LanguageBatch():
            return {"next_token": CrossEntropy(model(batch.ids).logits.values, batch.labels)}
        case Bert(), MaskedBatch():
            hidden = model.features(batch.ids, batch.segments)
            words = model.word_logits(hidden.values[batch.selected])  # (M, V): of the selected tokens only
            follows = model.next_logits(hidden.first())  # (N, 2)
            return {
                "masked_word": CrossEntropy(words, batch.labels),
                "next_sentence": CrossEntropy(follows, batch.next_labels),
            }
        case Bert(), LabelledBatch():
            logits = model.class_logits(model.features(batch.ids, batch.segments).first())
            return {"label": CrossEntropy(logits, batch.labels)}
        case Bert(), MultiLabelBatch():
            logits = model.class_logits(model.features(batch.ids, batch.segments).first())
            return {"labels": BinaryCrossEntropy(logits, batch.labels)}
        case Bert(), ValueBatch():
            values = model.class_logits(model.features(batch.ids, batch.segments).first())
            return {"value": SquaredError(values, batch.values)}
        case Bert(), TaggedBatch():
            logits = model.tag_logits(model.features(batch.ids).values[batch.first])  # (M, K)
            return {"tag": CrossEntropy(logits, batch.labels.values)}
        case Bert(), ContrastiveBatch():
            return {"pair": contrastive(model.features(batch.ids).mean(), batch)}
        case MultiTaskBert(), TaskBatch():
            terms = loss_terms(model.tasks[batch.task], batch.batch)
            return {f"{batch.task}/{name}": term for name, term in terms.items()}
        case Transformer(), PairBatch():
            return {
                "target_token": CrossEntropy(model(batch.source, batch.inputs).logits.values, batch.labels)
            }
        case ViT(), ImageBatch():
            return {"label": CrossEntropy(model.head(model.features(batch.images).first()), batch.labels)}
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
        self.training = model.training  # a new module trains, but whoever scores a model keeps its mode

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
