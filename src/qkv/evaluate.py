"""Held-out scores: losses and accuracies of the objective's terms, and what a field derives from them."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from pathlib import Path

import torch
from torch import Tensor

from qkv.checkpoint import CONFIG
from qkv.config import BertConfig, DataConfig, RunConfig, read_toml
from qkv.data import Dataset, Sampler, build, read, read_held_out
from qkv.errors import InputError
from qkv.objectives import Objective, Term
from qkv.pipelines import Translator, from_pretrained


@torch.no_grad()
def evaluate(objective: Objective, dataset: Dataset, batch_tokens: int = 8192) -> dict[str, float]:
    """Scores of a model on every sample of a dataset, in evaluation mode.

    For each loss term `<term>_loss` (nats) and `<term>_accuracy`; `loss`, their sum; for language
    models `perplexity` and `bits_per_byte`; for classifiers `macro_f1` and `matthews`. The answer
    does not depend on batch_tokens.
    """
    device = next(objective.parameters()).device
    was_training = objective.training
    objective.eval()
    losses: dict[str, float] = defaultdict(float)
    correct: dict[str, int] = defaultdict(int)
    counts: Counter[str] = Counter()
    confusion: Counter[tuple[int, int]] = Counter()
    for indices in Sampler(dataset.costs, batch_tokens, seed=0).epoch(0):
        batch = dataset.batch(indices, epoch=0).to(device)
        for name, term in objective.terms(batch).items():
            losses[name] += term.loss_sum().item()
            correct[name] += int(term.correct())
            counts[name] += len(term.labels)
            if name == "label":
                confusion += _confusion(term)
    objective.train(was_training)
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
    total, right = (
        confusion.total(),
        sum(n for (label, predicted), n in confusion.items() if label == predicted),
    )
    covariance = right * total - sum(labels[c] * predictions[c] for c in labels)
    spread = (total**2 - sum(n**2 for n in labels.values())) * (
        total**2 - sum(n**2 for n in predictions.values())
    )
    return covariance / math.sqrt(spread) if spread else 0.0


def _margins(confusion: Counter[tuple[int, int]]) -> tuple[Counter[int], Counter[int]]:
    labels: Counter[int] = Counter()
    predictions: Counter[int] = Counter()
    for (label, predicted), n in confusion.items():
        labels[label] += n
        predictions[predicted] += n
    return labels, predictions


def translation_scores(hypotheses: list[str], references: list[str]) -> dict[str, float | str]:
    """sacreBLEU's BLEU and chrF of detokenised text with their signatures (Post 2018).

    Raises InputError without the `eval` extra.
    """
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        raise InputError("translations are scored by sacreBLEU: pip install 'qkv[eval]'") from None

    bleu, chrf = BLEU(), CHRF()
    return {
        "bleu": bleu.corpus_score(hypotheses, [references]).score,
        "chrf": chrf.corpus_score(hypotheses, [references]).score,
        "bleu_signature": str(bleu.get_signature()),
        "chrf_signature": str(chrf.get_signature()),
    }


def score(source: str, data: str = "", num_beams: int = 5) -> dict[str, float | str]:
    """Scores of a run folder or checkpoint on all of `data`; "" takes the run's own held-out data.

    Column names are those of the run's config. Translations are also decoded with beam search and
    compared by `translation_scores`. Raises InputError for data that do not suit the model.
    """
    pipeline = from_pretrained(source)
    if isinstance(pipeline, Translator):
        translation_scores([""], [""])  # fails at once without sacreBLEU
    model = pipeline.model
    path = Path(source) / CONFIG
    run = read_toml(path) if path.exists() else RunConfig(model=model.config, data=DataConfig())
    labels: tuple[str, ...] = getattr(model.config, "labels", ())
    family = model.config.family
    if not data and not run.data.path:
        raise InputError(f"{source} is not a run folder: say with --data what to score it on")
    samples = read_held_out(data, run.data, family, labels) if data else read(run.data, family).valid
    if isinstance(model.config, BertConfig):
        head = "pretraining" if samples.kind == "text" else "classification"
        if model.config.head != head:
            raise InputError(
                f"{samples.kind} data score a {head} head, but {source} has the head {model.config.head!r}"
            )
    dataset = build(samples, run, pipeline.checkpoint.tokenizer, pipeline.checkpoint.images)
    scores: dict[str, float | str] = {"samples": len(samples), **evaluate(Objective(model), dataset)}
    if isinstance(pipeline, Translator):
        translations = pipeline.translate(samples.texts, num_beams=num_beams, truncate=run.data.truncate)
        scores |= {"num_beams": num_beams, **translation_scores(translations, samples.pairs)}
    return scores
