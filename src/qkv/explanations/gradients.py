"""Attributions from gradients: of an answer's log-odds by embeddings, and by attention probabilities.

Legend: U units of all sequences end to end, D model width, H heads, E head width, Uq and Uk units of queries
and of keys, N points of a path.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from qkv.attention import Pattern
from qkv.explanations.attention_flow import Look
from qkv.explanations.subjects import Question, Subject
from qkv.recording import LayerKey, tapped


@dataclass
class GradientTap:
    """A tap that keeps what the gradient of attention probabilities needs.

    An answer is O = A V, so dy/dA = (dy/dO) V^T for each head: no second softmax is needed for it.
    """

    values: list[Tensor] = field(default_factory=list)
    """(Uk, H, E) of each call."""
    answers: list[Tensor] = field(default_factory=list)
    """(Uq, H, E) of each call."""

    def see(self, query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, answer: Tensor) -> Tensor:
        """Keep one call."""
        self.values.append(value.detach())
        self.answers.append(answer)
        return answer


@dataclass(frozen=True)
class Gradients:
    """Of one choice's score."""

    embedded: Tensor
    """By the input's embeddings (U, D)."""
    weights: list[Tensor]
    """By each layer's attention probabilities (H, Uq, Uk), layers as they are computed."""


def gradients(subject: Subject, seen: Sequence[Look]) -> Iterator[Gradients]:
    """Those of each choice, from one forward pass; seen: the layers of which they are wanted."""
    taps: dict[LayerKey, GradientTap] = {(look.stack, look.layer): GradientTap() for look in seen}
    x = subject.embedded[None].clone().requires_grad_()
    with torch.enable_grad(), tapped(subject.model, taps):
        outputs = subject.outputs(x, subject.questions)[0]  # (C, K)
    answers = [tap.answers[0] for tap in taps.values()]
    values = [tap.values[0] for tap in taps.values()]
    for number, question in enumerate(subject.questions):
        with torch.enable_grad():
            score = subject.score(outputs[number], question.answer)
        first, *rest = torch.autograd.grad(score, [x, *answers], retain_graph=True, materialize_grads=True)
        weights = [
            torch.einsum("qhe,khe->hqk", grad, value) for grad, value in zip(rest, values, strict=True)
        ]
        yield Gradients(first[0], weights)


def relevance(seen: Sequence[Look], found: Sequence[Tensor], units: int) -> Tensor:
    """How relevant each unit is to each other's last state, (U, U): Chefer et al. 2021.

    "Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder Transformers".
    Each layer's A' is the mean over heads of (dy/dA * A)+ (equation 5). Self-attention adds A' R to its
    units' rows (6, 7), which hold what these have from either sequence. Cross-attention adds R'qq^T A' R'kk
    (10), where R' is I and the rest of R, its rows scaled to sum to 1 (8, 9). As the source never reads the
    target, (11) adds nothing. found: the gradients (H, Uq, Uk) of each layer.
    """
    R = torch.eye(units, device=seen[0].weights.device)
    for look, gradient in zip(seen, found, strict=True):
        A = (gradient.float() * look.weights).clamp(min=0).mean(0)  # (Uq, Uk)
        q, k = look.queries, look.keys
        if q == k:
            R[q] = R[q] + A @ R[q]
        else:
            R[q, k] = R[q, k] + _normalised(R[q, q]).T @ A @ _normalised(R[k, k])
    return R


def _normalised(R: Tensor) -> Tensor:
    """Equations 8 and 9. A row of nothing but its unit stays that."""
    identity = torch.eye(len(R), device=R.device)
    rest = R - identity
    sums = rest.sum(-1, keepdim=True)
    return rest / sums.where(sums > 0, 1.0) + identity


def gradient_x_input(subject: Subject, question: Question, gradient: Tensor) -> Tensor:
    """Gradient (U, D) times the input (Shrikumar et al. 2017), measured from the baseline: (U,).

    Their sum is how far the score would be from the baseline's if it were linear.
    """
    return (gradient * _difference(subject, question)).sum(-1)


def integrated_gradients(subject: Subject, question: Question, points: int = 50) -> Tensor:
    """Integrated gradients (Sundararajan et al. 2017, equation 1) from the baseline to the input, (U,).

    By Gauss-Legendre quadrature of so many points. The values sum to the difference of the scores at both
    ends (completeness, 3), as far as the quadrature goes.
    """
    nodes, weights = np.polynomial.legendre.leggauss(points)
    difference = _difference(subject, question)
    total = torch.zeros_like(difference)
    size = max(1, subject.batch() // 4)  # gradients keep all layers' states
    missing = torch.tensor((1 - nodes) / 2).to(total)
    share = torch.tensor(weights / 2).to(total)
    for part, weight in zip(torch.split(missing, size), torch.split(share, size), strict=True):
        x = (subject.embedded - part[:, None, None] * difference).requires_grad_()  # (N, U, D)
        with torch.enable_grad():
            scores = subject.score(subject.outputs(x, [question])[:, 0], question.answer)  # (N,)
        (gradient,) = torch.autograd.grad(scores.sum(), x)
        total += torch.einsum("n,nud->ud", weight, gradient)
    return (difference * total).sum(-1)


def _difference(subject: Subject, question: Question) -> Tensor:
    """What is taken away with each unit of the candidates, (U, D)."""
    return question.candidates[:, None] * (subject.embedded - subject.baseline)
