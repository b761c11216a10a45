"""How a run looks in a terminal: bars with rate and time left, and a line an evaluation."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Self

from qkv.config import RunConfig
from qkv.hub import Checkpoint
from qkv.observe import Observer, Record

if TYPE_CHECKING:  # rich is imported where something is shown: most answers are there before
    from rich.console import Console
    from rich.progress import Progress, TaskID

PATIENCE = 2.0
"""Seconds that work may take unseen."""

_REFRESH = 0.1
"""Seconds between changes of a bar that is told of every answer."""


class _LateBar:
    """A bar for work that may take long, used as a context manager: it is made once the work has."""

    bar: Progress | None = None

    def __init__(self, console: Callable[[], Console]) -> None:
        self._console = console

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def _shown(self, text: str, counts: bool) -> Progress:
        """The bar, with a text and either counts or a percentage."""
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        if self.bar is None:
            self.bar = Progress(
                BarColumn(bar_width=30),
                MofNCompleteColumn() if counts else TaskProgressColumn(),
                TextColumn(text),
                TimeRemainingColumn(),
                console=self._console(),
                transient=True,
                redirect_stdout=False,  # answers may go there
            )
            self.bar.start()
        return self.bar


class WorkBar(_LateBar):
    """How far work is that may take long: a `qkv.watch.Watch`."""

    def __init__(self, console: Callable[[], Console]) -> None:
        super().__init__(console)
        self.began: dict[str, float] = {}
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, doing: str, done: int, total: int) -> None:
        """Show the work once it has gone on for a while: as a bar, or outside a terminal as one line."""
        now = time.monotonic()
        if now - self.began.setdefault(doing, now) < PATIENCE:
            return
        bar = self._shown("{task.description}, left", counts=True)
        if doing not in self.tasks:
            if not bar.console.is_terminal:
                bar.console.print(f"{done:,} of {total:,} {doing} so far", highlight=False)
            self.tasks[doing] = bar.add_task(doing, total=total)
        bar.update(self.tasks[doing], completed=done, total=total)


class CorpusBar(_LateBar):
    """How far a corpus is read and how fast it is answered."""

    def __init__(self, console: Callable[[], Console], name: str, total: int | None) -> None:
        """total: of whatever unit `update` is told; None: nobody knows."""
        super().__init__(console)
        self.name, self.total = name, total
        self.task: TaskID | None = None
        self.began = self.told = time.monotonic()

    def update(self, read: int, answered: int) -> None:
        """read: so much of the total; answered: so many inputs since the beginning."""
        now = time.monotonic()
        if now - self.began < PATIENCE or now - self.told < _REFRESH:
            return
        self.told = now
        said = f"{answered / (now - self.began):,.0f} answers/s"
        bar = self._shown("of {task.description}, {task.fields[said]}, left", counts=False)
        if self.task is None:
            self.task = bar.add_task(self.name, total=self.total, completed=read, said=said)
        bar.update(self.task, completed=read, said=said)


class TrainingBar(Observer):
    """The progress of a run, and what is said of it.

    full_rate: tokens a second at which all of the machine's matrix peak would be used
    (`qkv.roofline.full_rate`); with it the bar shows MFU, the share that is.
    """

    def __init__(self, console: Console, full_rate: float | None = None) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.console = console
        self.full_rate = full_rate
        self.bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[said]}"),
            console=console,
            transient=True,
        )
        self.task: TaskID | None = None
        self.steps = 0
        self.seen: deque[tuple[int, float]] = deque()
        """The last steps, and how many seconds the run had taken behind each."""
        self.rate = 0.0
        self.before = 0.0

    def say(self, message: str) -> None:
        """Print a sentence above the bar."""
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def begin(self, config: RunConfig, step: int) -> None:
        """Show the bar."""
        self.steps = config.train.max_steps
        self.seen = deque(maxlen=config.train.eval_steps + 1)  # so that there is an evaluation among them
        self.task = self.bar.add_task("", total=self.steps, completed=step, said="")
        self.bar.start()
        self.before = time.monotonic()

    def step(self, step: int, record: Record) -> None:
        """Advance; the rate is a moving average over about twenty steps, the time left follows from the last
        `train.eval_steps`.
        """
        assert self.task is not None
        self.seen.append((step, record["seconds"]))
        done, took = (last - first for first, last in zip(self.seen[0], self.seen[-1], strict=True))
        left = f"{timedelta(seconds=round(took / done * (self.steps - step)))} left" if done else ""
        now = time.monotonic()
        rate = record["tokens"] / max(now - self.before, 1e-9)
        self.before = now
        self.rate = rate if not self.rate else 0.95 * self.rate + 0.05 * rate
        used = f"  MFU {100 * self.rate / self.full_rate:.0f} %" if self.full_rate else ""
        said = f"loss {record['loss']:.3f}  {self.rate:,.0f} tokens/s{used}  {left}"
        self.bar.update(self.task, completed=step, said=said)

    def evaluated(self, step: int, scores: Record, checkpoint: Checkpoint) -> None:
        """Print one line of scores."""
        shown = "  ".join(f"{name} {score:.4f}" for name, score in scores.items())
        self.say(f"step {step}: held-out {shown}")
        self.before = time.monotonic()

    def close(self) -> None:
        """Take the bar away."""
        self.bar.stop()
