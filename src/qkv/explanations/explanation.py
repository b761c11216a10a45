"""What an explanation holds: plain values, to be shown, saved and compared without the model.

Legend: U units of a sequence (tokens, or the class token and patches of an image), L layers, H heads,
Uq and Uk units of queries and of keys, K points of a curve, O random orders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qkv.config import ExplanationMethod
from qkv.pipelines import Guess

Floats = NDArray[np.float32]
Method = ExplanationMethod

Stack = Literal["encoder", "decoder", "cross"]
Outcome = Literal["class", "label", "value"]
"""What an answer is: one of several classes, as tokens and tags are too; a label, which may stand beside
others; or a value, a regression's or how similar two texts are."""


@dataclass(frozen=True)
class Units:
    """What a model reads or writes, cut into units: one sequence of them."""

    name: Literal["text", "source", "target", "image"]
    units: tuple[str, ...]
    """Each token as people write it, a leading space kept; of an image, the class token and "row,column"."""
    special: tuple[bool, ...]
    """Whether each is a marker of the model, such as [CLS], that the input does not hold."""
    segments: tuple[int, ...] = ()
    """Of two texts read as one: 0 or 1 for each unit."""
    words: tuple[int, ...] = ()
    """The word that each unit is part of, counted from 0, as white space parts them; -1 of none."""


@dataclass(frozen=True)
class Attention:
    """The attention probabilities of one stack."""

    stack: Stack
    queries: str
    """Name of the sequence that looks."""
    keys: str
    """Name of the sequence that is looked at."""
    weights: NDArray[np.float16]
    """(L, H, Uq, Uk); each row sums to 1."""
    layers: tuple[int, ...]
    """Which of the stack's layers these are."""
    heads: tuple[int, ...] = ()
    """Which of each layer's heads these are; none named: all."""


@dataclass(frozen=True)
class Faithfulness:
    """Whether a ranking of units says anything about the model: what happens when they go and come.

    Deletion and insertion (Petsiuk et al. 2018, "RISE", 3.3; Samek et al. 2017): units are replaced by a
    baseline, or put back into an input of nothing else, most relevant first, and the probability of the
    answer is followed. Random orders say what any ranking would get.
    """

    shares: Floats
    """Share of the units deleted or inserted so far, from 0 to 1, (K,)."""
    deletion: Floats
    """The answer's probability behind each, (K,); lower is better."""
    insertion: Floats
    """The same for insertion, (K,); higher is better."""
    random_deletion: Floats
    """Of random orders, (O, K)."""
    random_insertion: Floats
    """(O, K)."""

    @cached_property
    def deletion_area(self) -> float:
        """Area under the deletion curve: the answer's mean probability while units go."""
        return float(np.trapezoid(self.deletion, self.shares))

    @cached_property
    def insertion_area(self) -> float:
        """Area under the insertion curve: the answer's mean probability while units come."""
        return float(np.trapezoid(self.insertion, self.shares))

    @cached_property
    def random_gains(self) -> Floats:
        """Of each random order, its insertion area less its deletion area (O,)."""
        gains = np.trapezoid(self.random_insertion - self.random_deletion, self.shares, axis=1)
        return np.asarray(gains, dtype=np.float32)

    @cached_property
    def gain(self) -> float:
        """The insertion area less the deletion area: higher is better."""
        return self.insertion_area - self.deletion_area

    @cached_property
    def beaten(self) -> int:
        """How many random orders gain less than this one."""
        return int((self.random_gains < self.gain - _SAME).sum())

    @cached_property
    def beats_random(self) -> Literal["yes", "not clearly", "no", "worse", "too few units"]:
        """Whether the ranking says more than random orders do.

        That it beats so many of them by chance has the probability (O - beaten + 1) / (O + 1) at most
        (Phipson and Smyth 2010); if that is over a tenth, nothing is sure, unless it beats them all.
        """
        orders = len(self.random_gains)
        if len(self.shares) < 3:
            return "too few units"
        if self.beaten == orders or (orders - self.beaten + 1) / (orders + 1) <= 0.1:
            return "yes"
        if (self.random_gains > self.gain + _SAME).all():
            return "worse"
        return "not clearly" if self.beaten > orders / 2 else "no"

    @cached_property
    def verdict(self) -> str:
        """In words, whether the ranking says anything on this input."""
        orders = len(self.random_gains)
        beaten = (
            f"better than {'all' if self.beaten == orders else f'{self.beaten} of'} {orders} random orders"
        )
        match self.beats_random:
            case "too few units":
                return "too few units to tell"
            case "yes":
                return beaten
            case "worse":
                return f"worse than all {orders} random orders on this input"
            case unsure:
                return f"{unsure} better than random on this input: {beaten}"


_SAME = 1e-6
"""Gains that differ by less are the same."""


@dataclass(frozen=True)
class Relevance:
    """How much each unit has to do with one choice, as a method sees it."""

    method: Method
    values: Mapping[str, Floats]
    """By the name of the sequence, (U,) each; below 0: against the choice. What it cannot see has 0."""
    matrix: Mapping[str, Floats] = field(default_factory=dict)
    """Of methods that find it: how much each unit took from each other one, (Uq, Uk), by the stack."""
    faithfulness: Faithfulness | None = None


@dataclass(frozen=True)
class Choice:
    """One thing that the model chose: a class, a tag, a word that was hidden, the next token."""

    answer: str
    probability: float
    """Where the outcome is a value, that value; so in `Guess` too."""
    alternatives: tuple[Guess, ...]
    """The likeliest answers, best first, with the chosen one wherever it stands."""
    sequence: str
    """Name of the sequence in which it was made."""
    unit: int
    """At which unit: the class token, the mask, the tagged word, the token before the next one."""
    relevances: tuple[Relevance, ...]
    lens: tuple[tuple[Guess, ...], ...] = ()
    """What each layer would have answered (nostalgebraist 2020, "logit lens"), first layer first."""
    head_importance: Mapping[str, Floats] = field(default_factory=dict)
    """By stack: by how much the answer's log-probability (nats) or value falls without each head (L, H)."""
    outcome: Outcome = "class"


@dataclass(frozen=True)
class Alignment:
    """Which source words a translation's words come from."""

    matrix: Floats
    """(target words, source words); each row sums to 1."""
    links: tuple[tuple[int, int], ...]
    """Pairs of source and target word, from 0."""
    heads: tuple[tuple[int, int], ...]
    """Layers and heads of cross-attention that it was read from."""

    @cached_property
    def pharaoh(self) -> str:
        """The links as "source-target", as fast_align and Moses write them."""
        return " ".join(f"{source}-{target}" for source, target in self.links)


@dataclass(frozen=True)
class Picture:
    """An image as the model was given it, and its patches."""

    pixels: NDArray[np.uint8]
    """(height, width, 3)."""
    grid: tuple[int, int]
    """Rows and columns of patches; the unit of patch (r, c) is 1 + r * columns + c."""


@dataclass(frozen=True)
class Explanation:
    """Why a model answered as it did."""

    family: Literal["transformer", "bert", "gpt", "vit"]
    model: str
    """What it was opened as."""
    sequences: tuple[Units, ...]
    choices: tuple[Choice, ...]
    """One of a classifier; one for each tag, each word hidden, each token generated."""
    attention: tuple[Attention, ...]
    residual: float
    """Largest difference between A·V from these probabilities and what the kernel computed."""
    picture: Picture | None = None
    alignment: Alignment | None = None
    target: str | None = None
    """What was asked about in place of the model's own answer."""

    def _repr_html_(self) -> str:
        """The page, for notebooks."""
        from qkv.explanations.page import frame

        return frame(self)
