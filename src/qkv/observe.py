"""Who watches a run. The loop tells observers what happened; what they do with it never changes the run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from qkv.config import RunConfig
from qkv.hub import Checkpoint

Record = dict[str, float]
"""Numbers by name, as a line of metrics.jsonl holds them."""


class Observer:
    """One who looks away. Those who watch override what they want to see."""

    def say(self, message: str) -> None:
        """A sentence for the user."""

    def begin(self, config: RunConfig, step: int) -> None:
        """The loop starts behind `step`, which is 0 unless the run is resumed."""

    def step(self, step: int, record: Record) -> None:
        """An optimiser step is done.

        record: at least its loss, grad_norm, learning_rate, tokens (of all sequences), and the seconds that
        the run has taken so far.
        """

    def evaluated(self, step: int, scores: Record, checkpoint: Checkpoint) -> None:
        """The held-out scores behind a step, now in metrics.jsonl, and the model that they are of.

        checkpoint: that very model, whole, with what prepares its input; it is to be left as it is.
        """

    def close(self) -> None:
        """The loop is over: finished, interrupted, or stopped by an error."""


class Observers(Observer):
    """Several who watch one run, told in order."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self.observers = observers

    def say(self, message: str) -> None:
        """Tell all."""
        for observer in self.observers:
            observer.say(message)

    def begin(self, config: RunConfig, step: int) -> None:
        """Tell all."""
        for observer in self.observers:
            observer.begin(config, step)

    def step(self, step: int, record: Record) -> None:
        """Tell all."""
        for observer in self.observers:
            observer.step(step, record)

    def evaluated(self, step: int, scores: Record, checkpoint: Checkpoint) -> None:
        """Tell all."""
        for observer in self.observers:
            observer.evaluated(step, scores, checkpoint)

    def close(self) -> None:
        """Tell all, even if one fails."""
        with ExitStack() as stack:
            for observer in reversed(self.observers):
                stack.callback(observer.close)
