"""Word alignments of a translation, read from cross-attention.

Which heads align, and whether a target word's source shows where the word is written (predicted) or where
it is read again as input (Kobayashi et al. 2020, "Attention is Not Only a Weight", 5), differs from model
to model, and nobody says. So it is found without a gold alignment, by how much a head tells about this
sentence.

Legend: S and T units of source and target, J words of the source, I of the target.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qkv.explanations.attention_flow import Look, looks
from qkv.explanations.explanation import Alignment, Units
from qkv.explanations.inputs import subject_of
from qkv.explanations.subjects import Subject
from qkv.pipelines import Translator

NEAR = 0.8
"""Heads that tell at least this share of what the best one tells are read with it."""


def align_texts(translator: Translator, source: str, target: str) -> Alignment | None:
    """The alignment of a text and its translation, or None, as `align`. InputError: as `explain`."""
    subject = subject_of(translator, source, target, 1)
    return align(subject, looks(subject)[0])


def align(subject: Subject, seen: Sequence[Look]) -> Alignment | None:
    """The alignment of a Transformer's source and target; None if there is nothing to tell.

    That is where either has no words, or the target is one word for several: of a script without spaces,
    perhaps. Each target word is linked to the source word that its tokens look at most.
    """
    source, target = (_tokens_of_words(one).to(subject.embedded) for one in subject.sequences)
    if not (len(source) and len(target)) or len(target) == 1 < len(source):
        return None
    read_as_input, written = target, target.roll(-1, dims=1)  # a token is written one row before it is read
    best: dict[tuple[int, int], Tensor] = {}
    told: dict[tuple[int, int], float] = {}
    for rows in (read_as_input, written):
        maps = {
            (look.layer, head): _by_words(weights, source, rows)
            for look in seen
            if look.stack == "cross"
            for head, weights in enumerate(look.weights.to(source))
        }
        tells = {head: information(matrix) for head, matrix in maps.items()}
        if not told or max(tells.values()) > max(told.values()):
            best, told = maps, tells
    heads = tuple(head for head in sorted(told) if told[head] >= NEAR * max(told.values()))
    matrix = torch.stack([best[head] for head in heads]).mean(0)  # (I, J)
    # A word of nothing that the model reads looks at none.
    links = sorted((j, i) for i, j in enumerate(matrix.argmax(-1).tolist()) if target[i].any())
    return Alignment(matrix.float().cpu().numpy(), tuple(links), heads)


def information(matrix: Tensor) -> float:
    """How much an alignment (I, J) tells, in nats: the mutual information of target and source words.

    High where each target word looks at few source words, and others at others. A head that always looks at
    one place tells nothing.
    """
    return max(0.0, float((matrix * (matrix / matrix.mean(0)).log()).sum(-1).mean()))


def _tokens_of_words(sequence: Units) -> Tensor:
    """Which tokens are part of each word, bool (words, tokens)."""
    words = torch.tensor(sequence.words)
    return words == torch.arange(1 + int(words.max()))[:, None]


def _by_words(weights: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """weights (T, S) of tokens -> how much target words look at source words, (I, J); rows sum to 1."""
    found = target @ weights @ source.T + 1e-12  # no word that is looked at by none divides by 0
    return found / found.sum(-1, keepdim=True)
