"""Word alignments of a translation, read from cross-attention.

Legend: S and T units of source and target, J words of the source, I of the target, H heads.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from qkv.explanations.attention_flow import Look
from qkv.explanations.explanation import Alignment
from qkv.explanations.explanation import Sequence as Units
from qkv.explanations.subjects import Subject

Links = Collection[tuple[int, int]]
"""Pairs of source word and target word, from 0."""

NEAR = 0.9
"""Heads that tell at least this share of what the best one tells are read with it."""


def align(subject: Subject, seen: Sequence[Look]) -> Alignment | None:
    """The alignment of a Transformer's source and target; None if either has no words."""
    source, target = (_membership(one, subject.embedded.device) for one in subject.sequences)
    if not (len(source) and len(target)):
        return None
    words = {}
    for look in seen:
        if look.stack == "cross":
            for head, weights in enumerate(look.weights):
                words[look.layer, head] = _of_words(weights, source, target)
    told = {key: information(matrix) for key, matrix in words.items()}
    best = max(told.values())
    heads = tuple(key for key in sorted(told) if told[key] >= NEAR * best)
    matrix = torch.stack([words[key] for key in heads]).mean(0)  # (I, J)
    links = tuple(sorted((int(matrix[i].argmax()), i) for i in range(len(matrix))))
    return Alignment(matrix.cpu().numpy(), links, heads)


def _membership(sequence: Units, device: torch.device) -> Tensor:
    """Which units are part of each word, 0 or 1: (words, units)."""
    words = torch.tensor(sequence.words, device=device)
    return (torch.arange(int(words.max()) + 1, device=device)[:, None] == words).float()


def _of_words(weights: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """weights (T, S) -> how much each target word looks at each source word, (I, J); rows sum to 1."""
    found = target @ weights @ source.T + 1e-12
    return found / found.sum(-1, keepdim=True)


def information(matrix: Tensor) -> float:
    """How much an alignment (I, J) tells, in nats: the mutual information of target and source words.

    High where target words look at few source words each, and not at the same: a head that always looks at
    one place tells nothing.
    """
    mean = matrix.mean(0)
    return float((matrix * (matrix / mean).log()).sum(-1).mean())
