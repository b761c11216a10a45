"""Subjects of all families, and the same models computed with a softmax that shows its probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from PIL import Image
from test_pipelines import classifier, encoder, generator, image, translator
from torch import Tensor

from qkv.attention import Pattern
from qkv.explanations.inputs import subject_of
from qkv.explanations.subjects import Subject
from qkv.hub.sentence import Pooling
from qkv.pipelines import AnyPipeline

Case = tuple[AnyPipeline, str | tuple[str, str] | Image.Image, str | None]

TWO = "Two dogs run.", "A quick fox"

CASES: dict[str, Callable[[], Case]] = {
    "gpt": lambda: (generator(), "The quick brown", " fox jumps"),
    "transformer": lambda: (translator(), "Two dogs run.", "Zwei Hunde"),
    "transformer-rotary": lambda: (
        translator(position="rotary", qk_norm=True),
        "Two dogs run.",
        "Zwei Hunde",
    ),
    "bert-classification": lambda: (encoder("classification", ("a", "b", "c")), "A quick fox", None),
    "bert-pair": lambda: (encoder("classification", ("a", "b", "c")), ("Two dogs run.", "A fox jumps"), "b"),
    "bert-multi-label": lambda: (encoder("multi_label", ("a", "b", "c")), "A quick fox", "c"),
    "bert-regression": lambda: (encoder("regression", ("value",)), "A quick fox", None),
    "bert-masked": lambda: (encoder(), "The [MASK] brown [MASK] jumps", None),
    "bert-tagging": lambda: (encoder("tagging", ("a", "b")), "The quick brown fox", None),
    "bert-similarity": lambda: (encoder("none", pooling=Pooling()), TWO, None),
    "bert-first-token": lambda: (encoder("none", pooling=Pooling("cls")), TWO, None),
    "vit": lambda: (classifier(), image(0), None),
    "vit-rotary": lambda: (classifier(position="rotary", qk_norm=True), image(0), None),
}
ALONE = [name for name in CASES if name not in ("bert-similarity", "bert-first-token")]
"""Cases in which one text is read, or two as one."""


def subject(name: str, dtype: torch.dtype = torch.float64) -> Subject:
    """What is explained in a case, by a tiny model."""
    pipeline, given, target = CASES[name]()
    pipeline.model.to(dtype)
    return subject_of(pipeline, given, target, 4)


@dataclass
class Shown:
    """Probabilities (H, Uq, Uk) of each call of `attend`, for one sequence each."""

    maps: list[Tensor] = field(default_factory=list)


@contextmanager
def explicit_attention() -> Iterator[Shown]:
    """Attention as the paper writes it, one sequence at a time; the probabilities keep their gradients."""
    shown = Shown()

    def attend(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, dropout: float = 0.0) -> Tensor:
        (Lq,), (Lk,) = pattern.queries.lengths, pattern.keys.lengths
        scores = torch.einsum("qhe,khe->hqk", query, key) / query.shape[-1] ** 0.5
        if pattern.causal:
            scores = scores + torch.full((Lq, Lk), -torch.inf, dtype=scores.dtype).triu(Lk - Lq + 1)
        A = torch.exp(scores) / torch.exp(scores).sum(-1, keepdim=True)
        if A.requires_grad:
            A.retain_grad()
        shown.maps.append(A)
        return torch.einsum("hqk,khe->qhe", A, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qkv.attention.attend", attend)
        yield shown
