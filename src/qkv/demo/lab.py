"""What the parts of the demo share: where they write, how they train, what stays out of training."""

from __future__ import annotations

import csv
import hashlib
import shutil
import sysconfig
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from torch import Tensor

from qkv.checkpoint import read_metrics
from qkv.config import RunConfig
from qkv.console import TrainingBar
from qkv.errors import InputError
from qkv.job import Job, new_job
from qkv.recording import Record
from qkv.report.page import Card, Figure, Scores, Section, score_table
from qkv.report.pictures import Matrix
from qkv.report.plot import curve
from qkv.train import train


@dataclass(frozen=True)
class Run:
    """A finished training."""

    folder: Path
    job: Job
    scores: dict[str, float]
    """Held-out scores of the model that the folder holds, the one with the lowest held-out loss."""
    seconds: float

    def curve(self, title: str = "Learning curve") -> Figure:
        """Its loss, in training and on held-out data."""
        records = read_metrics(self.folder)
        training = [(r["step"], r["loss"]) for r in records if "loss" in r]
        held_out = [(r["step"], r["valid_loss"]) for r in records if "valid_loss" in r]
        return Figure(title, curve(training, held_out, "nats"))

    def facts(self) -> dict[str, str]:
        """Its size and what it took."""
        model, config = self.job.checkpoint.model, self.job.config.train
        return {
            "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
            "training": f"{config.max_steps:,} steps, about {config.batch_tokens:,} tokens each",
            "time": f"{self.seconds:.0f} s",
        }


@dataclass(frozen=True)
class Part:
    """What the demo says about one model."""

    key: str
    """Its name in lists and anchors."""
    title: str
    lead: str
    facts: dict[str, str]
    scores: Scores
    figures: tuple[Figure, ...]

    def section(self) -> Section:
        """The page's part about it."""
        scores = Figure("Held-out scores", score_table(self.scores))
        return Section(self.key, self.title, self.lead, self.facts, (scores, *self.figures))

    def card(self) -> Card:
        """Its first measure beside the best baseline's."""
        measure, rows, ours = self.scores.measures[0], self.scores.rows, self.scores.ours
        own, baseline = (self.scores.best(0, names) for names in (ours, rows.keys() - ours))
        caption = f"{measure.name}; best baseline {measure.show(baseline)}"
        return Card(self.title.split(":")[0], measure.show(own), caption, self.key)


@dataclass(frozen=True)
class Lab:
    """Where the demo writes and reports, and which share of each recipe's steps it takes."""

    out: Path
    console: Console
    share: float

    def data(self, family: str) -> Path:
        """An empty folder for a family's data."""
        return fresh(self.out / "data" / family)

    def train(self, name: str, config: RunConfig) -> Run:
        """Train a recipe in the run folder `name`, made afresh."""
        steps = max(2, round(self.share * config.train.max_steps))
        often = max(1, round(self.share * config.train.eval_steps))
        # The demo is never resumed; its state is written once, at the end.
        settings = replace(
            config.train,
            max_steps=steps,
            warmup_steps=min(config.train.warmup_steps, steps // 2),
            eval_steps=often,
            save_steps=steps,
        )
        folder = self.out / name
        shutil.rmtree(folder, ignore_errors=True)
        started = time.monotonic()
        job = new_job(replace(config, train=settings))
        done = train(job, folder, TrainingBar(self.console))
        return Run(folder, job, done.best_scores, time.monotonic() - started)


def fresh(folder: Path) -> Path:
    """An empty folder in place of what was there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def lot(name: str) -> float:
    """A number in [0, 1) drawn for a file, value or image by a hash of its name: the same at every run."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6]) / 2**48


def library() -> Path:
    """The folder of this Python's standard library. Raises InputError if it has no sources."""
    folder = Path(sysconfig.get_path("stdlib"))
    if not (folder / "argparse.py").exists():
        raise InputError(
            f"this Python keeps no sources of its standard library in {folder}; try --only vit transformer"
        )
    return folder


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A CSV file."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def logistic_regression(features: Any, labels: Sequence[str]) -> Any:
    """scikit-learn's, its regularisation chosen by cross-validation on the training data."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV

    search = GridSearchCV(LogisticRegression(max_iter=200, tol=1e-3), {"C": [0.3, 1.0, 3.0, 10.0]}, cv=3)
    return search.fit(features, labels)


def accuracy(predictions: Iterable[str], labels: Sequence[str]) -> float:
    """The share of the labels that are predicted."""
    return sum(p == label for p, label in zip(predictions, labels, strict=True)) / len(labels)


def recorded(maps: Record) -> str:
    """How an attention picture was made, and how far it is from what the model computed."""
    return (
        "Recorded beside the fused kernel, whose output these weights give again to within "
        f"{maps.residual:.0e}."
    )


def sharpest(maps: Record, seen: Tensor) -> tuple[int, int, Matrix]:
    """Layer, head and weights (R, C) of the head that looks most decidedly where `seen` (R, C) is True.

    maps: of one sequence and one stack.
    """
    found = []
    for key, tap in maps.taps.items():
        for head, weights in enumerate(tap.calls[-1][0]):  # (R, C)
            found.append((float((weights**2 * seen).sum()), key[1], head, weights))
    _, layer, head, weights = max(found, key=lambda f: f[0])
    return layer, head, np.asarray(weights, dtype=np.float32)
