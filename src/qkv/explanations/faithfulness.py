"""Whether a map says anything about the model: units are taken away, and the answer is watched.

All variants of an input have the same units, so they are computed together without padding.

Legend: U units of all sequences end to end, N variants, F free units, K points of a curve, O orders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qkv.explanations.explanation import Faithfulness, Floats, Relevance
from qkv.explanations.subjects import Question, Subject

POINTS = 11
"""Most points of a curve."""


@torch.no_grad()
def outputs_without(subject: Subject, question: Question, gone: Tensor) -> Tensor:
    """The model's outputs for a choice when units are taken away: gone bool (N, U) -> (N, answers)."""
    batches = torch.split(gone, subject.batch())
    found = [subject.outputs(subject.without(part), [question])[:, 0] for part in batches]
    return torch.cat(found)


def occlusion(subject: Subject, question: Question) -> Tensor:
    """By how much the answer's log-odds fall without each unit by itself, (U,)."""
    free = subject.free(question).nonzero()[:, 0]  # (F,)
    gone = torch.zeros(len(free) + 1, len(subject.embedded), dtype=torch.bool, device=free.device)
    gone[torch.arange(len(free), device=free.device), free] = True  # the last variant is the input itself
    scores = subject.score(outputs_without(subject, question, gone), question.answer)  # (F + 1,)
    values = torch.zeros(len(subject.embedded), dtype=scores.dtype, device=free.device)
    values[free] = scores[-1] - scores[:-1]
    return values


def faithfulness(
    subject: Subject, question: Question, maps: Sequence[Relevance], orders: int, seed: int
) -> list[Relevance]:
    """The maps of a choice with the curves of each, beside those of the same random orders.

    orders: how many of these, which depend on the seed and on where the choice was made.
    """
    free = subject.free(question).nonzero()[:, 0].cpu().numpy()  # (F,)
    counts = np.unique(np.linspace(0, len(free), POINTS).round().astype(int))  # (K,)
    rng = np.random.default_rng([seed, question.unit])
    values = [np.concatenate([one.values[s.name] for s in subject.sequences]) for one in maps]  # (U,) each
    ranked = [free[np.argsort(-own[free], kind="stable")] for own in values]
    ranked += [rng.permutation(free) for _ in range(orders)]
    deleted = np.zeros((len(ranked), len(counts), len(subject.embedded)), dtype=bool)
    for row, order in zip(deleted, ranked, strict=True):
        for point, count in zip(row, counts, strict=True):
            point[order[:count]] = True
    missing = np.zeros_like(deleted)
    missing[..., free] = ~deleted[..., free]
    deletion, insertion = _probabilities(subject, question, np.stack([deleted, missing]))  # (orders, K)
    shares = (counts / max(len(free), 1)).astype(np.float32)
    theirs = deletion[len(maps) :], insertion[len(maps) :]
    return [
        replace(one, faithfulness=Faithfulness(shares, deletion[i], insertion[i], *theirs))
        for i, one in enumerate(maps)
    ]


def _probabilities(subject: Subject, question: Question, gone: NDArray[np.bool_]) -> Floats:
    """The answer's probability without these units, (..., U) -> (...); what occurs twice is computed once."""
    variants, place = np.unique(gone.reshape(-1, gone.shape[-1]), axis=0, return_inverse=True)
    device = subject.embedded.device
    outputs = outputs_without(subject, question, torch.from_numpy(variants).to(device))
    found = subject.probabilities(outputs)[:, question.answer].cpu().numpy()
    return found[place.reshape(gone.shape[:-1])].astype(np.float32)
