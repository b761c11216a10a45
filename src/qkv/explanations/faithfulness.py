"""Whether a map says anything about the model: units are taken away, and the answer is watched.

All variants of an input have the same units, so they are computed together without padding.

Legend: U units of all sequences end to end, N variants, F free units, K points of a curve, O orders.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qkv.explanations.explanation import Faithfulness, Floats, Method
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
    subject: Subject, question: Question, maps: Mapping[Method, Floats], orders: int, seed: int
) -> dict[Method, Faithfulness]:
    """Of each map (U,) of a choice: its curves beside those of the same random orders.

    orders: how many of these; they depend on the seed and on nothing else.
    """
    free = subject.free(question).nonzero()[:, 0].cpu().numpy()  # (F,)
    counts = np.unique(np.rint(np.linspace(0, len(free), min(len(free) + 1, POINTS))).astype(int))  # (K,)
    rng = np.random.default_rng([seed, question.unit])
    ranked = [free[np.argsort(-values[free], kind="stable")] for values in maps.values()]
    ranked += [rng.permutation(free) for _ in range(orders)]
    gone = np.zeros((len(ranked), len(counts), len(subject.embedded)), dtype=bool)
    for number, order in enumerate(ranked):
        for point, count in enumerate(counts):
            gone[number, point, order[:count]] = True
    here = np.zeros(len(subject.embedded), dtype=bool)
    here[free] = True
    deletion, insertion = _probabilities(subject, question, np.stack([gone, here & ~gone]))
    shares = (counts / max(len(free), 1)).astype(np.float32)
    found = {}
    for number, method in enumerate(maps):
        own = deletion[number], insertion[number]
        found[method] = Faithfulness(shares, *own, deletion[len(maps) :], insertion[len(maps) :])
    return found


def _probabilities(subject: Subject, question: Question, gone: NDArray[np.bool_]) -> Floats:
    """The answer's probability without these units, (..., U) -> (...); what occurs twice is computed once."""
    variants, place = np.unique(gone.reshape(-1, gone.shape[-1]), axis=0, return_inverse=True)
    device = subject.embedded.device
    outputs = outputs_without(subject, question, torch.from_numpy(variants).to(device))
    found = subject.probabilities(outputs)[:, question.answer].cpu().numpy()
    return found[place.reshape(gone.shape[:-1])].astype(np.float32)
