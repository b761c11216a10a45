"""`explain`: all parts of an explanation, put together.

Legend: U units of all sequences end to end, H heads, Uq and Uk units of queries and of keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from qkv.errors import InputError
from qkv.explanations import alignment, attention_flow
from qkv.explanations.attention_flow import Look, looks
from qkv.explanations.explanation import Attention, Choice, Explanation, Floats, Method, Relevance
from qkv.explanations.faithfulness import faithfulness, occlusion
from qkv.explanations.gradients import (
    Gradients,
    gradient_x_input,
    gradients,
    integrated_gradients,
    relevance,
)
from qkv.explanations.heads import head_importance
from qkv.explanations.inputs import Input, subject_of
from qkv.explanations.lens import guesses, lens
from qkv.explanations.subjects import Question, Subject
from qkv.pipelines import AnyPipeline, from_pretrained
from qkv.runtime import evaluating
from qkv.watch import Watch, unwatched

METHODS: tuple[Method, ...] = tuple(method for method in get_args(Method) if method != "flow")
"""All but flow, which is for short inputs and needs scipy."""
RANDOM_ORDERS = 10
"""So many random orders that maps are compared with."""


def explain(
    model: AnyPipeline | str | Path,
    input: Input,
    target: str | None = None,
    *,
    methods: Sequence[Method] = METHODS,
    alternatives: int = 5,
    max_new_tokens: int = 16,
    random_orders: int = RANDOM_ORDERS,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    seed: int = 0,
    watch: Watch = unwatched,
) -> Explanation:
    """Why a model answered as it did: what it looked at, what its answers rest on, and whether that holds up.

    model: a pipeline, or what `from_pretrained` opens. input: a text; two in a tuple, which are read
    together or, by a model that makes vectors of texts, compared; an image or its path. target: what to
    explain in place of the model's own answer: a label, the token that fills the mask, a continuation, a
    translation; of a tagger the word, or all words with a tag.

    methods: how to say what matters. alternatives: so many of the likeliest answers are given.
    max_new_tokens: so many that GPT adds to a text. random_orders: so many that each map is compared with;
    0: faithfulness is not measured. layers, heads: those whose attention is given; None: all. seed: of the
    random orders. watch: told before each choice. Raises InputError for what cannot be explained.
    """
    _check(methods, alternatives, random_orders, seed)
    pipeline = from_pretrained(model) if isinstance(model, str | Path) else model
    if pipeline.road is not None:
        raise InputError("a model with a precision has no gradients: open the checkpoint without one")
    with torch.inference_mode(False), evaluating(pipeline.model):
        subject = subject_of(pipeline, input, target, max_new_tokens)
        seen, residual = looks(subject)
        attention = tuple(_attention(subject, seen, layers, heads))
        return Explanation(
            family=subject.family,
            model=str(model) if isinstance(model, str | Path) else type(pipeline).__name__,
            sequences=subject.sequences,
            choices=tuple(_choices(subject, seen, methods, alternatives, random_orders, seed, watch)),
            attention=attention,
            residual=residual,
            picture=subject.picture,
            alignment=alignment.align(subject, seen) if subject.family == "transformer" else None,
            target=target,
        )


def _check(methods: Sequence[Method], alternatives: int, random_orders: int, seed: int) -> None:
    for method in methods:
        if method not in get_args(Method):
            raise InputError(f"no method {method!r}; there are {', '.join(get_args(Method))}")
    least = {"alternatives": (alternatives, 1), "random_orders": (random_orders, 0), "seed": (seed, 0)}
    for name, (value, limit) in least.items():
        if value < limit:
            raise InputError(f"{name} is {value}; it must be at least {limit}")


# ---------------------------------------------------------------- choices


def _choices(
    subject: Subject,
    seen: Sequence[Look],
    methods: Sequence[Method],
    alternatives: int,
    random_orders: int,
    seed: int,
    watch: Watch,
) -> Iterator[Choice]:
    with torch.no_grad():
        outputs = subject.outputs(subject.embedded[None], subject.questions)[0]  # (C, K)
    maps = _Maps(subject, seen, methods)
    every = zip(
        subject.questions,
        subject.probabilities(outputs),
        gradients(subject, seen),
        lens(subject, alternatives),
        head_importance(subject),
        strict=True,
    )
    for done, (question, chances, found, layers, importance) in enumerate(every):
        watch("choices explained", done, len(subject.questions))
        relevances = [maps.relevance(method, question, found) for method in methods]
        if random_orders:
            relevances = faithfulness(subject, question, relevances, random_orders, seed)
        yield Choice(
            answer=subject.name(question.answer),
            probability=float(chances[question.answer]),
            alternatives=guesses(subject, chances, alternatives, question.answer),
            sequence=question.sequence,
            unit=question.unit,
            relevances=tuple(relevances),
            lens=layers,
            head_importance=importance,
            outcome=subject.outcome,
        )


class _Maps:
    """What each method says about a choice."""

    def __init__(self, subject: Subject, seen: Sequence[Look], methods: Sequence[Method]) -> None:
        """Raises InputError for a method that is not for such an input."""
        self.subject, self.seen = subject, seen
        self.units = len(subject.embedded)
        self.steps = attention_flow.steps(seen, self.units)
        self.attention = attention_flow.last(seen, self.units)  # (U, U)
        self.rollout = attention_flow.rollout(self.steps)  # (U, U)
        if "flow" in methods:
            attention_flow.check_flow(self.steps)

    def relevance(self, method: Method, question: Question, found: Gradients) -> Relevance:
        """How much each unit matters."""
        match method:
            case "attention":
                return self._read(method, question, self.attention)
            case "rollout":
                return self._read(method, question, self.rollout)
            case "relevance":
                R = relevance(self.seen, found.weights, self.units)
                if question.reads.count_nonzero() > 1:  # of a mean, each unit's own share says nothing
                    R = R - torch.eye(self.units, device=R.device)
                return self._read(method, question, R)
            case "flow":
                values = attention_flow.flow(self.steps, question.reads)
            case "gradient_x_input":
                values = gradient_x_input(self.subject, question, found.embedded)
            case "integrated_gradients":
                values = integrated_gradients(self.subject, question)
            case "occlusion":
                values = occlusion(self.subject, question)
        return Relevance(method, self._by_sequence(values))

    def _read(self, method: Method, question: Question, whole: Tensor) -> Relevance:
        """What the answer has from each unit, of how much each unit has from each (U, U).

        The latter is given too if there is one choice: all choices' would fill the memory.
        """
        values = question.reads.float() @ whole
        matrix: dict[str, Floats] = {}
        if len(self.subject.questions) == 1:
            matrix = {look.stack: _floats(whole[look.queries, look.keys]) for look in self.seen}
        return Relevance(method, self._by_sequence(values), matrix)

    def _by_sequence(self, values: Tensor) -> dict[str, Floats]:
        """Values (U,) of the units of all sequences."""
        return {one.name: _floats(values[self.subject.place(one.name)]) for one in self.subject.sequences}


def _floats(values: Tensor) -> Floats:
    return np.asarray(values.float().cpu().numpy())


# ---------------------------------------------------------------- attention


def _attention(
    subject: Subject, seen: Sequence[Look], layers: Sequence[int] | None, heads: Sequence[int] | None
) -> Iterator[Attention]:
    for stack, (queries, keys) in subject.stacks.items():
        weights = torch.stack([look.weights for look in seen if look.stack == stack])  # (L, H, Uq, Uk)
        chosen = _chosen("layer", layers, weights.shape[0])
        of_those = _chosen("head", heads, weights.shape[1])
        if not chosen or not of_those:
            continue
        kept = weights[list(chosen)][:, list(of_those)].cpu().numpy().astype(np.float16)
        yield Attention(stack, queries, keys, kept, chosen, of_those)


def _chosen(kind: str, wanted: Sequence[int] | None, count: int) -> tuple[int, ...]:
    if wanted is None:
        return tuple(range(count))
    if any(number not in range(-count, count) for number in wanted):
        raise InputError(f"{kind}s {list(wanted)} of a stack that has {count}, from 0 to {count - 1}")
    return tuple(range(count)[number] for number in wanted)
