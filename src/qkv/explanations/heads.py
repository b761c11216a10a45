"""How much an answer owes to each attention head: what happens without it.

Michel et al. 2019, "Are Sixteen Heads Really Better than One?", 3.2, for one input instead of a test set.

Legend: N variants of the input, U units of all sequences, Uq of the queries, D model width, H heads,
E head width, L layers, C choices, K possible answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qkv.attention import Pattern
from qkv.explanations.explanation import Floats
from qkv.explanations.subjects import Subject
from qkv.recording import tapped

Head = tuple[str, int, int]
"""Stack, layer and number."""


@dataclass
class Ablation:
    """A tap that silences heads: keep (N, H), in each variant 0 for a head that says nothing, else 1."""

    keep: Tensor

    def see(self, query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, answer: Tensor) -> Tensor:
        """One call, on variants of as many units each."""
        N, H = self.keep.shape
        variants = answer.reshape(N, -1, *answer.shape[1:])  # (N, Uq, H, E)
        return (variants * self.keep.view(N, 1, H, 1)).view_as(answer)


@torch.no_grad()
def head_importance(subject: Subject) -> list[dict[str, Floats]]:
    """Of each choice, by stack: by how much the answer's log-probability falls without each head, (L, H)."""
    shapes = {stack: (len(each), each[0].heads) for stack, each in subject.model.attentions().items()}
    heads = [(stack, *place) for stack, shape in shapes.items() for place in np.ndindex(shape)]
    size = subject.batch(len(subject.questions))
    batches = (heads[start : start + size] for start in range(0, len(heads), size))
    without = torch.cat([_log_probabilities(subject, silent) for silent in batches])  # (all heads, C)
    falls = (_log_probabilities(subject, [None]) - without).float().T.cpu().numpy()  # (C, all heads)
    ends = np.cumsum([L * H for L, H in shapes.values()])[:-1]
    return [
        {stack: part.reshape(shapes[stack]) for stack, part in zip(shapes, np.split(fall, ends), strict=True)}
        for fall in falls
    ]


def _log_probabilities(subject: Subject, silent: Sequence[Head | None]) -> Tensor:
    """Of each choice, in variants of the input with one head silent each, or none: (N, C)."""
    taps: dict[tuple[str, int], Ablation] = {}
    modules = subject.model.attentions()
    for number, place in enumerate(silent):
        if place is not None:
            stack, layer, head = place
            fresh = Ablation(subject.embedded.new_ones(len(silent), modules[stack][layer].heads))
            taps.setdefault((stack, layer), fresh).keep[number, head] = 0
    with tapped(subject.model, taps):
        x = subject.embedded.expand(len(silent), -1, -1)  # (N, U, D)
        outputs = subject.outputs(x, subject.questions)  # (N, C, K)
    answers = [question.answer for question in subject.questions]
    return torch.stack([subject.log_probability(outputs[:, c], a) for c, a in enumerate(answers)], dim=1)
