"""What is explained: one input, the choices that a model makes about it, and the way from one to the other.

The four families differ here and in no other part of an explanation: in what they read, in what stands for
nothing (the baseline), and in how answers come out of embeddings.

The baseline, one for all methods, is what a unit is replaced by to take it away. Positions and segments
stay, and so do the model's markers, such as [CLS]. BERT: its own mask token, which was trained to mean that
something is hidden. GPT and the Transformer have no such token, and an unknown or end token would say
something: theirs is the mean of all tokens' embeddings, which is nobody's. ViT: the patches of a blank
image, in the mean colour by which pixels are normalised.

Legend: U units of all sequences end to end (S of a source, T of a target), N variants of the input, D model
width, C choices, K possible answers, P patches.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.attention import Pattern
from qkv.config import Family
from qkv.errors import InputError
from qkv.explanations.explanation import Outcome, Picture, Stack, Units
from qkv.layers import rotation
from qkv.models import GPT, Bert, Transformer, ViT
from qkv.ragged import Layout

TOKENS = 4096
"""Units that are computed at a time, of all variants in a batch."""
OUTPUTS = 1 << 24
"""Outputs that are computed at a time: 64 MiB."""


@dataclass(frozen=True)
class Question:
    """One choice of the model, to be explained."""

    sequence: str
    unit: int
    """Where it was made: name of the sequence, and unit in it."""
    reads: Tensor
    """How much of each unit's last state the answer is read from, (U,); sums to 1."""
    candidates: Tensor
    """The units that are looked at for reasons, bool (U,); the others stay as they are in all variants."""
    answer: int = -1
    """Which of the K possible answers was chosen; -1: it is not known yet."""


@dataclass(frozen=True)
class Reading:
    """How answers are read from the last layer's state: by the model's own norm and head."""

    outputs: Callable[[Tensor, Sequence[Question]], Tensor]
    """A state of all units (N, ., D) -> the model's outputs for each choice (N, C, K)."""
    answers: int
    """K."""
    name: Callable[[int], str]
    """What the answer of a number is called."""
    outcome: Outcome = "class"
    """Whether outputs are logits of classes or of labels, or values."""


def at_units(state: Tensor, questions: Sequence[Question]) -> Tensor:
    """The states of the units where choices are made: (N, ., D) -> (N, C, D)."""
    return state[:, [question.unit for question in questions]]


class Subject(ABC):
    """One input, cut into units, and a model in evaluation mode.

    Embeddings are what the first blocks read. Variants of the input have as many units as the input itself.
    """

    family: Family
    model: Bert | GPT | Transformer | ViT

    def __init__(
        self,
        sequences: Sequence[Units],
        stacks: dict[Stack, tuple[str, str]],
        embedded: Tensor,
        baseline: Tensor,
        reading: Reading,
    ) -> None:
        """stacks: the sequences that the queries and keys of each are of. embedded, baseline: (U, D)."""
        self.sequences = tuple(sequences)
        self.stacks = stacks
        self.embedded, self.baseline = embedded.detach(), baseline.detach()
        self.reading, self.outcome, self.name = reading, reading.outcome, reading.name
        self.questions: list[Question] = []
        self.picture: Picture | None = None

    # ------------------------------------------------------------ units

    def place(self, sequence: str) -> slice:
        """Where a sequence's units are among all."""
        start = 0
        for one in self.sequences:
            if one.name == sequence:
                return slice(start, start + len(one.units))
            start += len(one.units)
        raise KeyError(sequence)

    def free(self, question: Question) -> Tensor:
        """The candidates that can be taken away, bool (U,): they are not the baseline already."""
        return question.candidates & (self.embedded != self.baseline).any(-1)

    def without(self, gone: Tensor) -> Tensor:
        """gone: the units that are taken away in each variant, bool (N, U) -> embeddings (N, U, D)."""
        return torch.where(gone[..., None], self.baseline, self.embedded)

    def ask(self, questions: Sequence[Question], answers: Sequence[int | None]) -> None:
        """Set the choices to be explained: the answers given, or where there is none the likeliest.

        Raises InputError if there is but one class.
        """
        if self.outcome == "class" and self.reading.answers < 2:
            raise InputError("this model knows a single class: it chooses nothing that could be explained")
        with torch.no_grad():
            likeliest = self.outputs(self.embedded[None], questions)[0].argmax(-1).tolist()  # (C,)
        given = zip(questions, answers, likeliest, strict=True)
        self.questions = [replace(q, answer=best if own is None else own) for q, own, best in given]

    def question(self, sequence: str, unit: int, causal: bool = False) -> Question:
        """What is chosen at a unit, from its own state. causal: by nothing that comes behind it."""
        at, count = self.place(sequence).start + unit, len(self.embedded)
        units = torch.arange(count, device=self.embedded.device)  # (U,)
        return Question(sequence, unit, (units == at).to(self.embedded), (units <= at) | (not causal))

    # ------------------------------------------------------------ answers

    def outputs(self, x: Tensor, questions: Sequence[Question]) -> Tensor:
        """x (N, U, D) -> the model's outputs for each choice (N, C, K)."""
        state = x
        for layer in self.states(x):
            state = layer
        return self.reading.outputs(state, questions)

    @abstractmethod
    def states(self, x: Tensor) -> Iterator[Tensor]:
        """x (N, U, D) -> what each layer of the stack that answers makes of its units (N, ., D)."""

    def batch(self, questions: int = 1) -> int:
        """How many variants are computed at a time."""
        return max(1, min(TOKENS // len(self.embedded), OUTPUTS // (self.reading.answers * questions)))

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Outputs (..., K) -> the probability of each; values stay what they are."""
        if self.outcome == "class":
            return outputs.float().softmax(-1)
        return outputs.float().sigmoid() if self.outcome == "label" else outputs.float()

    def log_probability(self, outputs: Tensor, answer: int) -> Tensor:
        """Outputs (..., K) -> the answer's log-probability in nats (...), or its value."""
        own = outputs[..., answer]
        if self.outcome == "class":
            return own - outputs.logsumexp(-1)
        return F.logsigmoid(own) if self.outcome == "label" else own

    def score(self, outputs: Tensor, answer: int) -> Tensor:
        """Outputs (..., K) -> the answer's log-odds (...), log p / (1 - p), or its value.

        What is attributed to units: unlike a logit it changes only if the probability does, and unlike the
        probability it does not saturate.
        """
        if self.outcome != "class":
            return outputs[..., answer]
        own = F.one_hot(torch.tensor(answer), self.reading.answers).bool().to(outputs.device)  # (K,)
        return outputs[..., answer] - outputs.masked_fill(own, float("-inf")).logsumexp(-1)


def _flat(x: Tensor, lengths: tuple[int, ...], *, causal: bool = False) -> tuple[Tensor, Pattern]:
    """Variants x (N, U, D), each of sequences of these lengths, as tokens (N U, D) and who attends whom."""
    layout = Layout(lengths * len(x), x.device)
    return x.flatten(0, 1), Pattern(layout, layout, causal)


# ---------------------------------------------------------------- the families


class BertSubject(Subject):
    """A text, or two that are read together or each by itself."""

    family = "bert"
    model: Bert

    def __init__(
        self,
        model: Bert,
        sequence: Units,
        ids: Tensor,
        segments: Tensor,
        lengths: tuple[int, ...],
        mask_id: int,
        reading: Reading,
    ) -> None:
        """ids, segments (U,) of what is read by itself, which has these lengths."""
        self.model, self.lengths = model, lengths
        positions = Layout(lengths, ids.device).positions
        special = torch.tensor(sequence.special, device=ids.device)
        hidden = torch.where(special, ids, mask_id)
        with torch.no_grad():
            embedded, baseline = (model.embed(one, segments, positions) for one in (ids, hidden))
        stacks: dict[Stack, tuple[str, str]] = {"encoder": ("text", "text")}
        super().__init__([sequence], stacks, embedded, baseline, reading)

    def states(self, x: Tensor) -> Iterator[Tensor]:
        """As of `Subject`."""
        for state in self.model.blocks.states(*_flat(x, self.lengths)):
            yield state.view_as(x)


class GPTSubject(Subject):
    """A text, each of whose tokens tells the next."""

    family = "gpt"
    model: GPT

    def __init__(self, model: GPT, sequence: Units, ids: Tensor, name: Callable[[int], str]) -> None:
        """ids (U,)."""
        self.model, self.positions = model, torch.arange(len(ids), device=ids.device)
        with torch.no_grad():
            embedded = model.embed(ids, self.positions)
            gone = model.tokens.weight.mean(0) - model.tokens(ids)
            gone[torch.tensor(sequence.special, device=ids.device)] = 0
        stacks: dict[Stack, tuple[str, str]] = {"decoder": ("text", "text")}
        reading = Reading(
            lambda state, questions: model.head(model.norm(at_units(state, questions))),
            model.config.vocab_size,
            name,
        )
        super().__init__([sequence], stacks, embedded, embedded + gone, reading)

    def states(self, x: Tensor) -> Iterator[Tensor]:
        """As of `Subject`."""
        tokens, pattern = _flat(x, (x.shape[1],), causal=True)
        turned = rotation(self.model.config, self.positions.repeat(len(x)))
        for state in self.model.blocks.states(tokens, pattern, rotation=turned):
            yield state.view_as(x)


class TransformerSubject(Subject):
    """A source and the target so far, each of whose tokens tells the next."""

    family = "transformer"
    model: Transformer

    def __init__(
        self,
        model: Transformer,
        sequences: Sequence[Units],
        ids: Sequence[Tensor],
        name: Callable[[int], str],
    ) -> None:
        """sequences and ids (S,), (T,): of source and target."""
        self.model, self.sizes = model, [len(one) for one in ids]
        device, every = ids[0].device, torch.cat(list(ids))
        special = torch.tensor([marker for one in sequences for marker in one.special], device=device)
        with torch.no_grad():
            embedded = model.embed(every, Layout(tuple(self.sizes), device).positions)
            gone = math.sqrt(model.config.dim) * (model.tokens.weight.mean(0) - model.tokens(every))
            gone[special] = 0
        stacks: dict[Stack, tuple[str, str]] = {
            "encoder": ("source", "source"),
            "decoder": ("target", "target"),
            "cross": ("target", "source"),
        }
        reading = Reading(
            lambda state, questions: model.head(model.decoder_norm(at_units(state, questions))),
            model.config.vocab_size,
            name,
        )
        super().__init__(sequences, stacks, embedded, embedded + gone, reading)

    def states(self, x: Tensor) -> Iterator[Tensor]:
        """As of `Subject`; the states are the target's."""
        source, target = torch.split(x, self.sizes, dim=1)  # (N, S, D), (N, T, D)
        tokens, sources = _flat(source, (self.sizes[0],))
        encoded = self.model.run_encoder(tokens, sources.queries.positions, sources)
        memory = self.model.decoder.read(encoded)
        tokens, targets = _flat(target, (self.sizes[1],), causal=True)
        across = Pattern(targets.queries, sources.keys)
        turned = rotation(self.model.config, targets.queries.positions)
        for state in self.model.decoder.states(
            tokens, targets, rotation=turned, memory=memory, memory_pattern=across
        ):
            yield state.view_as(target)


class ViTSubject(Subject):
    """An image, whose class token tells the class."""

    family = "vit"
    model: ViT

    def __init__(self, model: ViT, sequence: Units, image: Tensor, name: Callable[[int], str]) -> None:
        """image (channels, height, width), normalised."""
        self.model, self.image = model, image
        with torch.no_grad():
            embedded, baseline = model.embed(torch.stack([image, torch.zeros_like(image)]))  # (1 + P, D)
        stacks: dict[Stack, tuple[str, str]] = {"encoder": ("image", "image")}

        def outputs(state: Tensor, questions: Sequence[Question]) -> Tensor:
            logits = model.head(model.norm(state[:, 0]))  # (N, K)
            return logits[:, None].expand(-1, len(questions), -1)

        reading = Reading(outputs, len(model.config.labels), name)
        super().__init__([sequence], stacks, embedded, baseline, reading)

    def states(self, x: Tensor) -> Iterator[Tensor]:
        """As of `Subject`."""
        turned = self.model.rotation(self.image.expand(len(x), -1, -1, -1))
        for state in self.model.blocks.states(*_flat(x, (x.shape[1],)), rotation=turned):
            yield state.view_as(x)
