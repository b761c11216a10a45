"""Experiment trackers by name; a tracker's package is imported only when a run asks for it."""

from __future__ import annotations

import sys
import time
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from qkv.checkpoint import CONFIG
from qkv.config import RunConfig, TrackerName, TrainConfig
from qkv.errors import InputError
from qkv.files import replace_text
from qkv.hub import Checkpoint
from qkv.observe import Observer, Record

NAME = "tracked-as.txt"
"""In the run folder: the name of its record."""
PROJECT = "qkv"
"""What trackers file all runs under."""


class Tracker(Observer):
    """Passes on what metrics.jsonl records: `train/...` every logging_steps, `valid/...` at evaluations."""

    package: str
    """What is imported."""
    settings: TrainConfig
    """Of the run, once it has begun."""

    def __init__(self, run: Path) -> None:
        """Raises InputError if the package is not installed."""
        self.run = run
        try:
            self.module = import_module(self.package)
        except ImportError:
            name = self.package.rpartition(".")[2]
            raise InputError(
                f"train.report_to names {name}, which is not installed: pip install 'qkv[log]'"
            ) from None
        self.tracked: Any = None

    def begin(self, config: RunConfig, step: int) -> None:
        """Start, or continue behind `step`."""
        self.settings = config.train
        with redirect_stdout(sys.stderr):  # standard output is for a command's result
            self.tracked = self.open(config, step)

    def step(self, step: int, record: Record) -> None:
        """Log the training's numbers, as often as metrics.jsonl does."""
        if self.settings.records(step):
            self._tell(self.log, {f"train/{name}": value for name, value in record.items()}, step)

    def evaluated(self, step: int, scores: Record, checkpoint: Checkpoint) -> None:
        """Log the held-out scores."""
        self._tell(self.log, {f"valid/{name}": value for name, value in scores.items()}, step)

    def close(self) -> None:
        """Wait until all is stored or sent."""
        self._tell(self.end)

    def _tell(self, tell: Callable[..., None], *what: object) -> None:
        """Tell the package, unless it failed before: a run goes on without a tracker that is lost."""
        if self.tracked is None:
            return
        try:
            with redirect_stdout(sys.stderr):
                tell(*what)
        except Exception as error:  # whatever packages raise when a server or a disk is gone
            self.tracked = None
            name, said = type(self).__name__, " ".join(str(error).split()) or type(error).__name__
            warnings.warn(f"{name} failed and gets no more numbers of this run: {said}", stacklevel=3)

    def name(self) -> str:
        """The run folder's name and when the run began: a resumed run keeps it, and no two runs share it."""
        kept = self.run / NAME
        if not kept.exists():
            began = time.gmtime((self.run / CONFIG).stat().st_mtime)
            replace_text(kept, f"{self.run.name}-{time.strftime('%Y%m%d-%H%M%S', began)}")
        return kept.read_text(encoding="utf-8")

    @abstractmethod
    def open(self, config: RunConfig, step: int) -> Any:
        """The package's record of the run: a new one, or if `step` is above 0 the one there is."""

    @abstractmethod
    def log(self, values: Record, step: int) -> None:
        """Add numbers of a step."""

    @abstractmethod
    def end(self) -> None:
        """Finish the record."""


class TensorBoard(Tracker):
    """Event files in the run folder: `tensorboard --logdir runs`."""

    package = "torch.utils.tensorboard"

    def open(self, config: RunConfig, step: int) -> Any:
        """TensorBoard is told to forget what was written of later steps, by a run that was cut off.

        It reads files in the order of their names, which tell the second and then the process: a file of
        the same second is not surely read before the new one, so that second is let pass.
        """
        folder = self.run / "tensorboard"
        born = max((int(file.name.split(".")[3]) for file in folder.glob("events.out.tfevents.*")), default=0)
        time.sleep(min(1.0, max(0.0, born + 1 - time.time())))
        return self.module.SummaryWriter(str(folder), purge_step=step + 1)

    def log(self, values: Record, step: int) -> None:
        """One scalar each."""
        for name, value in values.items():
            self.tracked.add_scalar(name, value, step)

    def end(self) -> None:
        """Write out what is pending."""
        self.tracked.close()


class _Dashboard(Tracker):
    """What trackio and wandb have in common."""

    def log(self, values: Record, step: int) -> None:
        """All at once."""
        self.tracked.log(values, step=step)

    def end(self) -> None:
        """Wait until all is stored or sent."""
        self.module.finish()


class Trackio(_Dashboard):
    """A database on this machine: `trackio show`.

    It forgets nothing: what a killed run had logged behind its last state is there twice, with equal values.
    """

    package = "trackio"

    def open(self, config: RunConfig, step: int) -> Any:
        """A resumed run goes on under its name."""
        return self.module.init(PROJECT, self.name(), config=asdict(config), resume="allow", embed=False)


class WandB(_Dashboard):
    """Weights & Biases: its server, or with WANDB_MODE=offline a file in the run folder."""

    package = "wandb"

    def open(self, config: RunConfig, step: int) -> Any:
        """A resumed run goes on under its id. Raises InputError if wandb does not start."""
        name, settings = self.name(), asdict(config)
        try:
            return self.module.init(
                project=PROJECT, id=name, name=name, dir=str(self.run), config=settings, resume="allow"
            )
        except self.module.Error as error:
            raise InputError(
                f"wandb does not start ({error}): log in with `wandb login`, or set WANDB_MODE=offline"
            ) from None


TRACKERS: dict[TrackerName, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WandB,
}


def trackers(names: Sequence[TrackerName], run: Path) -> list[Tracker]:
    """The observers that `train.report_to` names. Raises InputError if one's package is not installed."""
    return [TRACKERS[name](run) for name in names]
