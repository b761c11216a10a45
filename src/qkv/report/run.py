"""report.html in a run folder: how a run goes, written anew at every evaluation and at its end.

The page is made of what the run folder holds, metrics.jsonl and samples.jsonl, so a resumed run's page
tells of all that came before.
"""

from __future__ import annotations

import json
import platform
import time
import warnings
from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from qkv.checkpoint import read_metrics
from qkv.config import Family, RunConfig, write_toml
from qkv.data.summary import Split, Spread, Summary
from qkv.files import replace_text
from qkv.hub import Checkpoint, by_task
from qkv.job import Job
from qkv.observe import Observer, Record
from qkv.pipelines import pipeline
from qkv.report.exhibits import Exhibit, exhibit
from qkv.report.page import Card, Figure, Measure, Scores, Section, page, score_table, shares, table
from qkv.report.plot import Line, Look, Point, curve, plot
from qkv.runtime import device_name, evaluating

REPORT = "report.html"
SAMPLES = "samples.jsonl"

_EARLIER = 12
"""How many evaluations before the last one are shown with their samples."""
_LABELS = 30
"""How many classes are shown with their sizes."""
_LOOKS: tuple[Look, ...] = ("valid", "other")
_NAMES: dict[Family, str] = {"gpt": "GPT", "bert": "BERT", "transformer": "Transformer", "vit": "ViT"}


class RunReport(Observer):
    """Writes report.html, and samples.jsonl with what the model made of held-out samples at each evaluation.

    full_rate: tokens a second at which all of the machine's matrix peak would be used; with it the page
    tells MFU, the share that is.
    """

    def __init__(self, job: Job, run: Path, full_rate: float | None = None) -> None:
        self.job = job
        self.run = run
        self.full_rate = full_rate
        checkpoints = by_task(job.checkpoint)
        found = {
            task: exhibit(checkpoints[task], samples, job.summaries[task].labels)
            for task, samples in job.examples.items()
        }
        self.exhibits = {task: shown for task, shown in found.items() if shown is not None}
        self.history: list[dict[str, Any]] = []
        """The lines of samples.jsonl: a step, a task, and the answers behind it."""

    def begin(self, config: RunConfig, step: int) -> None:
        """Take up the samples until `step`; those of later steps are from a run that was cut off."""
        path = self.run / SAMPLES
        # A text may hold characters that str.splitlines takes for the end of a line.
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if step and path.exists() else []
        self.history = [line for line in map(json.loads, lines) if line["step"] <= step]

    def evaluated(self, step: int, scores: Record, checkpoint: Checkpoint) -> None:
        """Ask the model, and write the page."""
        if self.exhibits:
            device = str(next(checkpoint.model.parameters()).device)
            checkpoints = by_task(checkpoint)
            # That a young model's texts are cut is no news.
            with evaluating(checkpoint.model), warnings.catch_warnings(action="ignore"):
                for task, shown in self.exhibits.items():
                    answers = shown.ask(pipeline(checkpoints[task], device))
                    self.history.append({"step": step, "task": task, "answers": answers})
            lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in self.history)
            replace_text(self.run / SAMPLES, "".join(lines))
        self.write()

    def close(self) -> None:
        """Write the page with what came after the last evaluation."""
        self.write()

    def write(self) -> None:
        """Write the whole page. Raises InputError if it cannot be written."""
        config, records = self.job.config, read_metrics(self.run)
        scores = [record for record in records if "valid_loss" in record]
        steps = [record for record in records if "loss" in record]
        if not steps:
            return
        last = steps[-1]
        family = _NAMES[config.model.family]
        units = [
            "squared error" if data.task == "regression" else "nats"
            for data in (config.tasks or {"": config.data}).values()
        ]
        unit = " + ".join(sorted(set(units)))
        lead = (
            f"Step {last['step']:,} of {config.train.max_steps:,} after {_duration(last['seconds'])} of "
            f"training; this page was written at {time.strftime('%Y-%m-%d %H:%M:%S %Z')}."
        )
        curves = _learning(steps, scores, unit, _unlike(config))
        sections = [
            Section("learning", "How it learns", "", {}, tuple(curves)),
            *self._samples(),
            *(_data(summary, task) for task, summary in self.job.summaries.items()),
            self._setting(),
        ]
        html = page(f"{family}: {self.run.name}", lead, self._cards(steps, scores), sections)
        replace_text(self.run / REPORT, html)

    def _cards(self, steps: Sequence[Record], scores: Sequence[Record]) -> Iterator[Card]:
        done, of = steps[-1]["step"], self.job.config.train.max_steps
        yield Card("Progress", f"{100 * done / of:.0f} %", f"{done:,} of {of:,} steps", "learning")
        if scores:
            best = min(scores, key=lambda record: record["valid_loss"])
            caption = f"lowest so far, at step {best['step']:,}; the run folder holds that model"
            yield Card("Held-out loss", f"{best['valid_loss']:.4g}", caption, "learning")
            for name in [name for name in best if name.endswith("_accuracy")][:1]:
                said = name.removeprefix("valid_").removesuffix("_accuracy").replace("_", " ")
                yield Card("Accuracy", f"{100 * best[name]:.1f} %", f"{said} right, at that step", "learning")
        if rate := _rate(steps):
            share = f"; MFU {100 * rate / self.full_rate:.1f} %" if self.full_rate else ""
            yield Card("Speed", f"{rate:,.0f}", f"tokens a second{share}", "setting")

    def _samples(self) -> Iterator[Section]:
        """A section for each task whose answers are shown."""
        for task, asked in self.exhibits.items():
            if lines := [line for line in self.history if line["task"] == task]:
                yield self._answers(task, asked, lines)

    def _answers(self, task: str, asked: Exhibit[Any], lines: Sequence[dict[str, Any]]) -> Section:
        last, earlier = lines[-1], lines[:-1]
        html = f"{asked.show(last['answers'])}<p>{escape(asked.caption)}</p>"
        every = max(1, -(-len(earlier) // _EARLIER))
        for line in reversed(earlier[::every]):
            shown = asked.show(line["answers"])
            html += f"<details><summary>at step {line['step']:,}</summary>{shown}</details>"
        title = f"{asked.title} at step {last['step']:,}"
        figure = Figure(title, html, wide=True)
        return _section("samples", "What it does", task, "", figure)

    def _setting(self) -> Section:
        job = self.job
        model, config = job.checkpoint.model, job.config
        device = next(model.parameters()).device
        facts = {
            "device": device_name(device),
            "precision": config.train.precision,
            "software": f"Python {platform.python_version()}, torch {torch.__version__}, {platform.system()}",
            "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        }
        if self.full_rate:
            facts["tokens a second at the machine's matrix peak"] = f"{self.full_rate:,.0f}"
        recipe = f'<pre class="tall"><code>{escape(write_toml(config))}</code></pre>'
        figure = Figure("config.toml", recipe, "A recipe: qkv train takes it as it is.", wide=True)
        return Section("setting", "Machine and settings", "", facts, (figure,))


def _section(key: str, title: str, task: str, lead: str, *figures: Figure) -> Section:
    """Of one of several tasks by its name, or "" of the only one."""
    return Section(f"{key}-{task}" if task else key, f"{title}: {task}" if task else title, lead, {}, figures)


def _unlike(config: RunConfig) -> str:
    """How the training loss differs from the held-out loss."""
    said = []
    if config.tasks:
        said.append("A step's loss is that of its one task, the held-out loss the sum over all tasks.")
    more = {
        "label smoothing": config.train.label_smoothing_factor,
        "R-Drop": config.train.r_drop,
        "mixup": config.augment.mixup,
        "CutMix": config.augment.cutmix,
    }
    if names := [name for name, weight in more.items() if weight]:
        said.append(f"The training loss is with {' and '.join(names)}, the held-out loss without.")
    return " ".join(said)


def _learning(steps: Sequence[Record], scores: Sequence[Record], unit: str, unlike: str) -> Iterator[Figure]:
    """Curves and scores; unit: of the loss; unlike: in what the two losses differ."""
    yield Figure("Loss", curve(_points(steps, "loss"), _points(scores, "valid_loss"), unit), unlike)
    accuracies = [name for name in (scores[0] if scores else ()) if name.endswith("_accuracy")]
    for task, names in groupby(accuracies, lambda name: _title(name).rpartition("/")[0]):
        lines = [
            Line(_title(name).removesuffix(" accuracy"), _points(scores, name), look, dots=True)
            for name, look in zip(names, _LOOKS, strict=False)
        ]
        title = f"Held-out accuracy: {task}" if task else "Held-out accuracy"
        yield Figure(title, plot(lines, "held-out accuracy", "share right"))
    rate = Line("learning rate", _points(steps, "learning_rate"))
    yield Figure("Learning rate", plot([rate], "learning rate", "learning rate"))
    norm = Line("gradient norm", _points(steps, "grad_norm"), smooth=True)
    yield Figure("Gradient norm", plot([norm], "gradient norm", "norm before clipping"))
    if scores:
        html = f'<div class="tall">{score_table(_table(scores))}</div>'
        yield Figure(
            "Held-out scores", html, "The run folder holds the model of the row in colour.", wide=True
        )


def _table(scores: Sequence[Record]) -> Scores:
    """A row an evaluation, the last one first."""
    names = [name for name in scores[0] if name.startswith("valid_")]
    measures = tuple(
        Measure(
            _title(name),
            digits=4,
            percent=name.endswith("_accuracy"),
            lower_is_better=name.endswith(("loss", "perplexity", "bits_per_byte")),
        )
        for name in names
    )
    rows = {f"{r['step']:,}": tuple(r.get(name) for name in names) for r in reversed(scores)}
    best = min(scores, key=lambda record: record["valid_loss"])
    return Scores(measures, rows, frozenset({f"{best['step']:,}"}), rows_are="Step")


def _title(name: str) -> str:
    return name.removeprefix("valid_").replace("_", " ")


def _data(summary: Summary, task: str) -> Section:
    """What there is to learn from."""
    splits = (summary.train, summary.valid)
    figures = [Figure("Samples", table(("", "training", "held out"), _rows(*splits)))]
    if summary.labels:
        rows = [
            (name, tuple(split.labels[i] / max(split.labelled, 1) for split in splits))
            for i, name in enumerate(summary.labels[:_LABELS])
        ]
        more = len(summary.labels) - _LABELS
        caption = f"{more:,} more labels are not shown." if more > 0 else ""
        figures.append(Figure("Labels", shares(("label", "training", "held out"), rows), caption))
    if remarks := list(summary.remarks()):
        items = "".join(f"<li>{escape(remark)}</li>" for remark in remarks)
        figures.append(Figure("Remarks", f"<ul>{items}</ul>", wide=bool(summary.labels)))
    return _section("data", "Data", task, summary.about, *figures)


def _rows(*splits: Split) -> Iterator[tuple[str, ...]]:
    yield "samples", *(f"{split.samples:,}" for split in splits)
    yield "tokens", *(f"{split.tokens:,}" for split in splits)
    yield "tokens of a sequence", *(_spread(split.lengths) for split in splits)
    for i in range(len(splits[0].characters)):
        name = "characters of a text" if i == 0 else "characters of a second text"
        yield name, *(_spread(split.characters[i]) for split in splits)
    if splits[0].characters:
        yield "empty texts", *(f"{split.empty:,}" for split in splits)
    yield "repeated samples", *("–" if s.repeated is None else f"{s.repeated:,}" for s in splits)


def _spread(spread: Spread) -> str:
    least, median, most = (f"{count:,}" for count in spread)
    return least if least == most else f"{least} to {most}, median {median}"


def _points(records: Sequence[Record], name: str) -> list[Point]:
    return [(record["step"], record[name]) for record in records if name in record]


def _rate(steps: Sequence[Record]) -> float | None:
    """Tokens a second between records, in the middle of all: evaluations and pauses do not count."""
    rates = [
        after["tokens"] * (after["step"] - before["step"]) / (after["seconds"] - before["seconds"])
        for before, after in pairwise(steps)
        if after["seconds"] > before["seconds"]
    ]
    return median(rates) if rates else None


def _duration(seconds: float) -> str:
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds % 3600 // 60
    return (
        f"{hours} h {minutes} min"
        if hours
        else f"{minutes} min {seconds % 60} s"
        if minutes
        else f"{seconds} s"
    )
