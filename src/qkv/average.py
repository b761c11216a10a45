"""Averages of a run's weights, which are scored and kept in place of the last ones.

Each works in place on the parameters of one model, whole or sharded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from qkv.checkpoint import load_weights, regular_states
from qkv.config import TrainConfig

Weights = dict[str, Tensor]


class Average:
    """How the weights that are scored and kept follow from those that are trained: here they are the same."""

    def __init__(self) -> None:
        self.state: Weights = {}
        """What resuming needs, by parameter name."""

    def update(self, model: nn.Module) -> None:
        """An optimiser step is done."""

    def weights(self, model: nn.Module, run: Path) -> Weights:
        """The averaged parameters; none: the model's own."""
        return {}


class MovingAverage(Average):
    """The mean of all weights so far, a step's counting `decay` times the next one's.

    It begins with the initial weights, which are soon forgotten: at step t the decay in use is
    min(decay, (1 + t) / (10 + t)), as in TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.state = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.state[_COUNT] = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards the model's weights."""
        steps = int(self.state[_COUNT]) + 1
        self.state[_COUNT].fill_(steps)
        share = 1.0 - min(self.decay, (1 + steps) / (10 + steps))
        present = {name: p.detach() for name, p in model.named_parameters()}
        torch._foreach_lerp_([self.state[name] for name in present], list(present.values()), share)

    def weights(self, model: nn.Module, run: Path) -> Weights:
        """The moving average."""
        return {name: value for name, value in self.state.items() if name != _COUNT}


_COUNT = "steps"


class LastCheckpoints(Average):
    """The mean of the present weights and those of the last saved states, `count` in all.

    Only states saved at multiples of `every` steps count, so that an interrupt, which saves one in between,
    changes nothing.
    """

    def __init__(self, count: int, every: int) -> None:
        super().__init__()
        self.count, self.every = count, every

    @torch.no_grad()
    def weights(self, model: nn.Module, run: Path) -> Weights:
        """The mean, added up from the oldest to the newest."""
        present = {name: p.detach() for name, p in model.named_parameters()}
        total = {name: torch.zeros_like(p) for name, p in present.items()}
        earlier = regular_states(run, self.every)[-(self.count - 1) :]
        for state in earlier:
            stored = load_weights(state, {name: torch.empty_like(p) for name, p in present.items()})
            for name, value in stored.items():
                total[name] += value
        return {name: (total[name] + p) / (len(earlier) + 1) for name, p in present.items()}


def average_of(model: nn.Module, config: TrainConfig) -> Average:
    """The average that the settings ask for."""
    if config.ema_decay:
        return MovingAverage(model, config.ema_decay)
    if config.average_checkpoints > 1:
        return LastCheckpoints(config.average_checkpoints, config.save_steps)
    return Average()


@contextmanager
@torch.no_grad()
def replaced(model: nn.Module, weights: Weights) -> Iterator[None]:
    """Inside, the model has these parameters; then its own again."""
    own = {name: p.detach().clone() for name, p in model.named_parameters() if name in weights}
    _put(model, weights)
    try:
        yield
    finally:
        _put(model, own)


@torch.no_grad()
def _put(model: nn.Module, weights: Weights) -> None:
    for name, p in model.named_parameters():
        if name in weights:
            p.copy_(weights[name])
