"""What each layer would have answered: nostalgebraist 2020, "interpreting GPT: the logit lens".

The state behind a layer is read as if it were the last, by the model's own last norm and head.

Legend: C choices, K possible answers, R guesses of a choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkv.explanations.subjects import Subject
from qkv.pipelines import Guess


@torch.no_grad()
def lens(subject: Subject, count: int) -> list[tuple[tuple[Guess, ...], ...]]:
    """Of each choice, the likeliest answers, so many, of each layer from first to last."""
    layers = []
    for state in subject.states(subject.embedded[None]):
        chances = subject.probabilities(subject.reading.outputs(state, subject.questions)[0])  # (C, K)
        layers.append([guesses(subject, row, count) for row in chances])
    return list(zip(*layers, strict=True))


def guesses(subject: Subject, chances: Tensor, count: int, always: int | None = None) -> tuple[Guess, ...]:
    """The likeliest answers by their probabilities (K,), best first; `always` is added if it is not one."""
    best = chances.topk(min(count, len(chances))).indices.tolist()
    chosen = best if always is None or always in best else [*best, always]
    return tuple(Guess(subject.name(answer), float(chances[answer])) for answer in chosen)
