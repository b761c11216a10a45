"""Scores from labels and predictions, as their fields define them. Nothing here knows of models or batches.

Legend: M answers, N texts, K labels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkv.config import BleuTokenizer
from qkv.errors import need


def f1(right: float, said: float, true: float) -> float:
    """The harmonic mean of right / said and right / true; 0 where nothing was said or true."""
    return 2 * right / (said + true) if said + true else 0.0


# ---------------------------------------------------------------- classes


def macro_f1(confusion: Counter[tuple[int, int]]) -> float:
    """The mean over classes of 2 TP / (2 TP + FP + FN); classes that occur as label or prediction count."""
    labels, predictions = _margins(confusion)
    classes = labels.keys() | predictions.keys()
    return sum(f1(confusion[c, c], predictions[c], labels[c]) for c in classes) / len(classes)


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


# ---------------------------------------------------------------- independent labels


def label_scores(labels: NDArray[np.bool_], predictions: NDArray[np.bool_]) -> dict[str, float]:
    """labels, predictions (N, K) -> three scores.

    micro_f1: over all decisions. macro_f1: the mean over labels that occur in either. exact_match: the
    share of texts with all labels right.
    """
    right = (labels & predictions).sum(0)  # (K,)
    said, true = predictions.sum(0), labels.sum(0)
    each = [f1(*counts) for counts in zip(right.tolist(), said.tolist(), true.tolist(), strict=True)]
    occurring = [score for score, occurs in zip(each, said + true, strict=True) if occurs]
    return {
        "micro_f1": f1(float(right.sum()), float(said.sum()), float(true.sum())),
        "macro_f1": sum(occurring) / len(occurring) if occurring else 0.0,
        "exact_match": float((labels == predictions).all(1).mean()),
    }


# ---------------------------------------------------------------- values


def pearson(one: NDArray[Any], other: NDArray[Any]) -> float:
    """The correlation of values (M,); 0 where either is constant."""
    if not (np.ptp(one) and np.ptp(other)):
        return 0.0
    a, b = (values - values.mean(dtype=np.float64) for values in (one, other))
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def spearman(one: NDArray[Any], other: NDArray[Any]) -> float:
    """The correlation of the ranks of values (M,), equal values having their mean rank."""
    return pearson(_ranks(one), _ranks(other))


def _ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[place]


# ---------------------------------------------------------------- entities


def is_bio(names: Sequence[str]) -> bool:
    """Whether tags mark entities: O outside, B-kind at the beginning, I-kind inside."""
    marks = {name[:2] for name in names if name != "O"}
    return bool(marks) and marks <= {"B-", "I-"}


def entities(tags: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """The entities of a sentence: first word, the one behind the last, kind.

    As in the CoNLL shared tasks' own script, an I- that follows nothing of its kind begins an entity.
    """
    start, kind = 0, ""
    for place, tag in enumerate([*tags, "O"]):
        mark, _, here = tag.partition("-")
        if kind and (mark != "I" or here != kind):
            yield start, place, kind
            kind = ""
        if mark != "O" and not kind:
            start, kind = place, here


def entity_scores(labels: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 of whole entities, right in both ends and kind, over all sentences."""
    right = said = true = 0
    for theirs, ours in zip(labels, predictions, strict=True):
        expected, found = set(entities(theirs)), set(entities(ours))
        right, said, true = right + len(expected & found), said + len(found), true + len(expected)
    return {
        "precision": right / said if said else 0.0,
        "recall": right / true if true else 0.0,
        "f1": f1(right, said, true),
    }


# ---------------------------------------------------------------- translations

Links = Collection[tuple[int, int]]
"""Of a sentence and its translation, pairs of source word and target word."""


def alignment_error_rate(found: Sequence[Links], sure: Sequence[Links]) -> float:
    """AER of all sentences' links where all of them are sure (Och and Ney 2003, 4.1).

    1 - 2 |A & S| / (|A| + |S|); 0 without any link.
    """
    hits = total = 0
    for links, certain in zip(found, sure, strict=True):
        A, S = set(links), set(certain)
        hits, total = hits + 2 * len(A & S), total + len(A) + len(S)
    return 1 - hits / total if total else 0.0


def translation_scores(
    hypotheses: list[str], references: list[str], tokenize: BleuTokenizer = "13a"
) -> dict[str, float | str]:
    """sacreBLEU's BLEU and chrF with their signatures (Post 2018); tokenize: of BLEU.

    Raises InputError without the `eval` extra.
    """
    need("scoring translations", "eval", "sacrebleu")
    from sacrebleu.metrics import BLEU, CHRF

    bleu, chrf = BLEU(tokenize=tokenize), CHRF()
    return {
        "bleu": bleu.corpus_score(hypotheses, [references]).score,
        "chrf": chrf.corpus_score(hypotheses, [references]).score,
        "bleu_signature": str(bleu.get_signature()),
        "chrf_signature": str(chrf.get_signature()),
    }
