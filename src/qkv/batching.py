"""Any number of inputs through a model in batches of alike cost, answered in their order.

Inputs are read a window ahead and no further, so that there may be more of them than memory holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

BATCH_TOKENS = 4096
"""Most tokens that a pipeline gives a model at once; an input larger than that goes alone."""

WINDOW_CHARACTERS = 1 << 16
"""Most characters of text that are read ahead: about four batches of similar lengths. More would gain little,
as nothing is padded, and the first answer of a window waits for its last."""

Input = TypeVar("Input")
Prepared = TypeVar("Prepared")
Answer = TypeVar("Answer")


def in_order(
    inputs: Iterable[Input],
    prepare: Callable[[list[Input], int], Sequence[Prepared]],
    cost: Callable[[Prepared], int],
    answer: Callable[[list[Prepared]], Sequence[Answer]],
    size: Callable[[Input], int],
    room: int,
) -> Iterator[Answer]:
    """The answer to each input, in the order of the inputs.

    prepare: what the model reads of a window of inputs, of which the first has that number; cost: its tokens;
    answer: the answers to a batch. size, room: a window holds inputs of at most that size together.
    """
    first = 0
    for window in windows(inputs, size, room):
        ready = prepare(window, first)
        found: dict[int, Answer] = {}
        for indices in batches([cost(one) for one in ready]):
            found |= zip(indices, answer([ready[i] for i in indices]), strict=True)
        yield from (found[i] for i in range(len(window)))
        first += len(window)


def windows(inputs: Iterable[Input], size: Callable[[Input], int], room: int) -> Iterator[list[Input]]:
    """Successive inputs whose sizes add up to at most `room`, or just reach beyond it."""
    window: list[Input] = []
    left = room
    for one in inputs:
        window.append(one)
        left -= size(one)
        if left <= 0:
            yield window
            window, left = [], room
    if window:
        yield window


def batches(costs: Sequence[int]) -> Iterator[list[int]]:
    """Indices of inputs in batches of at most BATCH_TOKENS; the costliest come first, alike ones together."""
    batch: list[int] = []
    room = BATCH_TOKENS
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        if batch and costs[i] > room:
            yield batch
            batch, room = [], BATCH_TOKENS
        batch.append(i)
        room -= costs[i]
    if batch:
        yield batch
