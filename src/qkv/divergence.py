"""When to give up a run: its loss is no number, or rose and stays high; and what to try then."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qkv.config import TrainConfig
from qkv.errors import InputError

WINDOW = 20
"""Steps over which the loss is smoothed, and at the beginning averaged."""
PATIENCE = 200
"""Steps in a row that the smoothed loss must be too high: spikes from which runs recover are shorter."""


@dataclass
class LossTrend:
    """The smoothed loss against its lowest value so far.

    A run has diverged if for PATIENCE steps in a row the smoothed loss was above its lowest value by more
    than the largest of

    - half of what was learnt: of the way from the first WINDOW steps' mean down to that lowest value;
    - a quarter of the first steps' mean, so that a run that learns little is not judged by little;
    - one and a half standard deviations of a single step's loss around the smoothed one, in all the run
      while that was not too high. The smoothed loss of a steady run has a sixth of that deviation,
      1 / sqrt(2 WINDOW), however the losses are distributed, and seldom the same excess for long.

    Its fields are plain numbers, so that a run's state keeps them.
    """

    steps: int = 0
    smooth: float = 0.0
    """Mean loss of the first WINDOW steps; behind them, a moving average over about as many."""
    steady: int = 0
    """Steps that `variance` is about."""
    variance: float = 0.0
    """Mean square of a step's loss minus `smooth` before it."""
    start: float = 0.0
    """`smooth` behind the first WINDOW steps."""
    lowest: float = math.inf
    """The least that `smooth` was since."""
    too_high: int = 0
    """Steps in a row that the smoothed loss was too high."""

    def add(self, loss: float) -> None:
        """Take in the loss of the next step."""
        self.steps += 1
        change = loss - self.smooth
        self.smooth += change / min(self.steps, WINDOW)
        if self.steps > 1 and not self.too_high:
            self.steady += 1
            self.variance += (change**2 - self.variance) / self.steady
        if self.steps < WINDOW:
            return
        if self.steps == WINDOW:
            self.start = self.smooth
        self.lowest = min(self.lowest, self.smooth)
        learnt = self.start - self.lowest
        margin = max(learnt / 2, abs(self.start) / 4, 1.5 * math.sqrt(self.variance))
        self.too_high = self.too_high + 1 if self.smooth > self.lowest + margin else 0

    @property
    def diverged(self) -> bool:
        """Whether the loss rose far above its lowest value and stayed there."""
        return self.too_high >= PATIENCE


def check_finite(step: int, config: TrainConfig, *values: float) -> None:
    """Raises InputError if one of a step's losses and gradient norms is not a finite number."""
    if not all(map(math.isfinite, values)):
        raise InputError(f"the loss or its gradient is no longer a number at step {step}: {_advice(config)}")


def check_trend(step: int, config: TrainConfig, trend: LossTrend) -> None:
    """Raises InputError if the run has diverged."""
    if trend.diverged:
        raise InputError(
            f"the loss diverged: until step {step} it was far above its best for {PATIENCE} steps "
            f"({trend.smooth:.3g}, {trend.lowest:.3g} at best): {_advice(config)}"
        )


def _advice(config: TrainConfig) -> str:
    return (
        f"lower train.learning_rate (now {config.learning_rate:g}), raise train.warmup_steps "
        f"(now {config.warmup_steps}) or lower train.max_grad_norm (now {config.max_grad_norm:g}), and train "
        f"into another --out; the best model and the last saved state are kept"
    )
