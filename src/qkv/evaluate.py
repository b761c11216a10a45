"""Held-out scores: losses and accuracies of the objective's terms, and what a field derives from them."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import torch
from torch import Tensor

from qkv.data import Dataset, Sampler
from qkv.models import Model
from qkv.objectives import Term, objective_for


@torch.inference_mode()
def evaluate(model: Model, dataset: Dataset, batch_tokens: int = 8192) -> dict[str, float]:
    """Scores of a model on every sample of a dataset, in evaluation mode.

    For each loss term `<term>_loss` (nats) and `<term>_accuracy`; `loss`, their sum; for language
    models `perplexity` and `bits_per_byte`; for classifiers `macro_f1` and `matthews`. The answer
    does not depend on batch_tokens.
    """
    objective = objective_for(dataset.batch_type)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    losses: dict[str, float] = defaultdict(float)
    correct: dict[str, int] = defaultdict(int)
    counts: Counter[str] = Counter()
    confusion: Counter[tuple[int, int]] = Counter()
    for indices in Sampler(dataset.costs, batch_tokens, seed=0).epoch(0):
        batch = dataset.batch(indices, epoch=0).to(device)
        for name, term in objective.terms(model, batch).items():
            losses[name] += term.loss_sum().item()
            correct[name] += int(term.correct())
            counts[name] += len(term.labels)
            if name == "label":
                confusion += _confusion(term)
    model.train(was_training)
    scores = {"loss": sum(losses[name] / counts[name] for name in losses)}
    for name, count in counts.items():
        scores |= {f"{name}_loss": losses[name] / count, f"{name}_accuracy": correct[name] / count}
    if "next_token" in counts:
        scores["perplexity"] = math.exp(min(scores["next_token_loss"], 700.0))
        scores["bits_per_byte"] = losses["next_token"] / math.log(2) / dataset.size_in_bytes
    if confusion:
        scores |= {"macro_f1": macro_f1(confusion), "matthews": matthews(confusion)}
    return scores


def _confusion(term: Term) -> Counter[tuple[int, int]]:
    """How often each (label, prediction) occurred."""
    pairs: Tensor = torch.stack([term.labels, term.logits.argmax(-1)], dim=1)  # (M, 2)
    return Counter((label, predicted) for label, predicted in pairs.tolist())


def macro_f1(confusion: Counter[tuple[int, int]]) -> float:
    """The mean over classes of 2 TP / (2 TP + FP + FN); classes that occur as label or prediction count."""
    labels, predictions = _margins(confusion)
    classes = labels.keys() | predictions.keys()
    return sum(2 * confusion[c, c] / (labels[c] + predictions[c]) for c in classes) / len(classes)


def matthews(confusion: Counter[tuple[int, int]]) -> float:
    """The correlation of labels and predictions (Gorodkin 2004, equation 8); 0 where either is constant."""
    labels, predictions = _margins(confusion)
    total, right = confusion.total(), sum(n for (label, predicted), n in confusion.items() if label == predicted)
    covariance = right * total - sum(labels[c] * predictions[c] for c in labels)
    spread = (total**2 - sum(n**2 for n in labels.values())) * (total**2 - sum(n**2 for n in predictions.values()))
    return covariance / math.sqrt(spread) if spread else 0.0


def _margins(confusion: Counter[tuple[int, int]]) -> tuple[Counter[int], Counter[int]]:
    labels: Counter[int] = Counter()
    predictions: Counter[int] = Counter()
    for (label, predicted), n in confusion.items():
        labels[label] += n
        predictions[predicted] += n
    return labels, predictions


def translation_scores(hypotheses: list[str], references: list[str]) -> dict[str, float | str]:
    """sacreBLEU's BLEU and chrF of detokenised text with their signatures (Post 2018). Needs the `eval` extra."""
    from sacrebleu.metrics import BLEU, CHRF

    bleu, chrf = BLEU(), CHRF()
    return {
        "bleu": bleu.corpus_score(hypotheses, [references]).score,
        "chrf": chrf.corpus_score(hypotheses, [references]).score,
        "bleu_signature": str(bleu.get_signature()),
        "chrf_signature": str(chrf.get_signature()),
    }
