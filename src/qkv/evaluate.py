"""Held-out scores: losses and accuracies of the objective's terms, and what a field derives from them."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from qkv.checkpoint import CONFIG, STATES, progress_of, saved_states
from qkv.config import (
    BEAMS,
    BertConfig,
    BleuTokenizer,
    DataConfig,
    Family,
    InferencePrecision,
    RunConfig,
    Task,
    read_toml,
)
from qkv.data import (
    Dataset,
    MultiTaskDataset,
    Sampler,
    Samples,
    bert_head,
    build,
    check_labels,
    read,
    read_held_out,
)
from qkv.data.batches import Batch, TaggedBatch, TaskBatch
from qkv.data.raw import PAIRABLE
from qkv.distributed import ALONE, Ranks
from qkv.errors import InputError
from qkv.files import expanded
from qkv.hub.sentence import check_contrastive
from qkv.metrics import (
    entity_scores,
    is_bio,
    label_scores,
    macro_f1,
    matthews,
    pearson,
    spearman,
    translation_scores,
)
from qkv.models import Model, MultiTaskBert
from qkv.objectives import Objective, Term
from qkv.pipelines import Translator, from_pretrained
from qkv.pipelines.base import warn
from qkv.runtime import evaluating

Answers = tuple[NDArray[np.generic], NDArray[np.generic]]
"""Labels and predictions of a batch, or of one of its sentences."""


@torch.no_grad()
def evaluate(
    objective: Objective, dataset: Dataset, batch_tokens: int = 8192, ranks: Ranks = ALONE
) -> dict[str, float]:
    """Scores of a model on every sample of a dataset, in evaluation mode; several ranks share the work.

    For each loss term `<term>_loss` (nats, or squares of a value's unit) and, but for values,
    `<term>_accuracy`; `loss`, their sum; and what `derived` and, for language models, `perplexity` and
    `bits_per_byte` tell. Of several tasks, all of these as `task/name`, and in `loss` the sum over tasks. The
    answer does not depend on batch_tokens, and is the same on all ranks.
    """
    with evaluating(objective):
        if not isinstance(dataset, MultiTaskDataset):
            return _scores(objective, dataset, batch_tokens, ranks)
        parts = dataset.tasks.items()
        return joined({task: _scores(objective, part, batch_tokens, ranks, task) for task, part in parts})


def joined(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The scores of several tasks as those of one model, whose loss is the sum of theirs."""
    scores: dict[str, Any] = {"loss": sum(part["loss"] for part in parts.values())}
    for task, part in parts.items():
        scores |= {f"{task}/{name}": score for name, score in part.items()}
    return scores


@dataclass
class _Tally:
    """What a score is made of, by the names of the loss terms."""

    losses: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    correct: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    answers: dict[str, list[Answers]] = field(default_factory=dict)

    def add(self, name: str, term: Term, batch: Batch) -> None:
        """Count one term of a batch."""
        self.losses[name] += term.loss_sum().item()
        self.counts[name] += len(term)
        if (right := term.correct()) is not None:
            self.correct[name] += int(right)
        if name in ("label", "labels", "value", "tag"):
            self.answers.setdefault(name, []).extend(_answers(term, batch))

    @staticmethod
    def joined(tallies: Iterable[_Tally]) -> _Tally:
        """All of them together."""
        whole = _Tally()
        for part in tallies:
            for name, loss in part.losses.items():
                whole.losses[name] += loss
            whole.correct.update(part.correct)
            whole.counts.update(part.counts)
            for name, answers in part.answers.items():
                whole.answers.setdefault(name, []).extend(answers)
        return whole


def _scores(
    objective: Objective, dataset: Dataset, batch_tokens: int, ranks: Ranks, task: str = ""
) -> dict[str, float]:
    """Of one task: of a multi-task model that of this name."""
    device = next(objective.parameters()).device
    model = objective.model.tasks[task] if isinstance(objective.model, MultiTaskBert) else objective.model
    batches = Sampler(dataset.costs, batch_tokens, seed=0).epoch(0)
    own = _Tally()
    for indices, counts in ranks.share(batches, spare=batches[0]):
        batch = dataset.batch(indices, epoch=0).to(device)
        for name, term in objective.terms(TaskBatch(task, batch) if task else batch).items():
            if counts:
                own.add(name.removeprefix(f"{task}/"), term, batch)
    tally = _Tally.joined(ranks.gather(own))
    scores = {"loss": sum(tally.losses[name] / tally.counts[name] for name in tally.losses)}
    for name, count in tally.counts.items():
        scores[f"{name}_loss"] = tally.losses[name] / count
        if name in tally.correct:
            scores[f"{name}_accuracy"] = tally.correct[name] / count
    if "next_token" in tally.counts:
        scores["perplexity"] = math.exp(min(scores["next_token_loss"], 700.0))
        scores["bits_per_byte"] = tally.losses["next_token"] / math.log(2) / dataset.size_in_bytes
    for name, parts in tally.answers.items():
        scores |= derived(name, parts, getattr(model.config, "labels", ()))
    return scores


def _answers(term: Term, batch: Batch) -> list[Answers]:
    labels, predictions = term.labels.cpu().numpy(), term.predictions().cpu().numpy()
    if not isinstance(batch, TaggedBatch):
        return [(labels, predictions)]
    ends = np.cumsum(batch.labels.lengths)[:-1]
    return list(zip(np.split(labels, ends), np.split(predictions, ends), strict=True))


def derived(name: str, parts: list[Answers], names: tuple[str, ...]) -> dict[str, float]:
    """What is usual to know of a term's answers beside its loss and accuracy.

    `macro_f1` and `matthews` of classes; `micro_f1`, `macro_f1` and `exact_match` of independent labels;
    `pearson` and `spearman` of values; `precision`, `recall` and `f1` of the entities that BIO tags mark, and
    `macro_f1` of other tags. names: of the classes, labels or tags.
    """
    labels, predictions = (np.concatenate(column) for column in zip(*parts, strict=True))
    if name == "labels":
        return label_scores(labels, predictions)
    if name == "value":
        return {"pearson": pearson(labels, predictions), "spearman": spearman(labels, predictions)}
    if name == "tag" and is_bio(names):
        said = [[[names[tag] for tag in tags] for tags in column] for column in zip(*parts, strict=True)]
        return entity_scores(*said)
    confusion = Counter(zip(labels.tolist(), predictions.tolist(), strict=True))
    return {"macro_f1": macro_f1(confusion)} | ({} if name == "tag" else {"matthews": matthews(confusion)})


def _task(model: Model, data: DataConfig) -> Literal["auto", Task]:
    """What a model's head says about how data are to be read; otherwise what the run says."""
    match model.config:
        case BertConfig(head="classification" | "multi_label" | "regression" | "tagging" as task):
            return task
        case _:
            return data.task


def _settings(folder: Path) -> RunConfig | None:
    """Those of a run folder, or of the task whose folder in a run it is; None if it is neither."""
    folder = folder.absolute()  # "." has no parent
    if (folder / CONFIG).exists():
        return read_toml(folder / CONFIG)
    if folder.is_dir() and (folder.parent / STATES).is_dir() and (folder.parent / CONFIG).exists():
        run = read_toml(folder.parent / CONFIG)
        return run.of_task(folder.name) if folder.name in run.tasks else None
    return None


def _fingerprint(folder: Path) -> str | None:
    """That of the held-out data of a run folder, or of a task's folder in it; None if nothing tells it."""
    folder = folder.absolute()
    run, task = (folder, "") if (folder / STATES).is_dir() else (folder.parent, folder.name)
    states = saved_states(run)
    return progress_of(states[-1]).held_out.get(task) if states else None


def _held_out(data: DataConfig, family: Family, labels: tuple[str, ...]) -> Samples:
    """A run's own. Raises InputError if its data have other labels by now."""
    raw = read(data, family)
    check_labels(raw, labels)
    return raw.valid


def score(
    source: str,
    data: str = "",
    num_beams: int = BEAMS,
    tokenize: BleuTokenizer = "13a",
    precision: InferencePrecision | Literal["auto"] | None = None,
    truncate: bool = False,
) -> dict[str, float | str]:
    """Scores of a run folder or checkpoint on all of `data`; "" takes the run's own held-out data.

    Column names are those of the run's config. Of a run of several tasks all are scored, each on its own
    held-out data; a task's folder in it is scored as a run of that task. Translations are also decoded
    with beam search and compared by `translation_scores`, which is told to `tokenize`. precision: of a model
    made faster by `qkv.fast.optimize`. truncate: cut texts longer than the context, as a run does whose
    config says so. Raises InputError for data that do not suit the model.
    """
    settings = _settings(expanded(source))
    if settings and settings.tasks:
        folders = {name: str(expanded(source) / name) for name in settings.tasks}
        if data:
            named = ", ".join(folders.values())
            raise InputError(f"{source} has several tasks: score one on other data, as {named}")
        options = (num_beams, tokenize, precision, truncate)
        return joined({name: score(folder, "", *options) for name, folder in folders.items()})
    pipeline = from_pretrained(source, precision=precision)
    if isinstance(pipeline, Translator):
        translation_scores([""], [""], tokenize)  # fails at once without sacreBLEU
    elif (num_beams, tokenize) != (BEAMS, "13a"):
        raise InputError("num_beams and tokenize are for translations: leave them out")
    model = pipeline.model
    # The settings of one of several tasks have the encoder's model, without a head.
    run = (
        replace(settings, model=model.config)
        if settings
        else RunConfig(model=model.config, data=DataConfig())
    )
    labels: tuple[str, ...] = getattr(model.config, "labels", ())
    family = model.config.family
    if truncate and family in ("gpt", "vit"):
        raise InputError(f"no sample of a {family} is too long: leave truncate out")
    run = replace(run, data=replace(run.data, truncate=truncate or run.data.truncate))
    if not data and not run.data.path:
        raise InputError(f"{source} is not a run folder: say with --data what to score it on")
    asked = replace(run.data, task=_task(model, run.data))
    samples = read_held_out(data, asked, family, labels) if data else _held_out(asked, family, labels)
    if isinstance(model.config, BertConfig):
        head = bert_head(samples.kind)
        if head != "none" and model.config.head != head:
            raise InputError(
                f"{samples.kind} data score a {head} head, but {source} has the head {model.config.head!r}"
            )
        if samples.kind == "regression" and len(labels) > 1:
            raise InputError(f"{source} gives {len(labels)} values, but the data have one a text")
        if samples.kind == "contrastive":
            check_contrastive(pipeline.checkpoint.pooling, source)
        if settings and data and settings.data.text_pair and samples.kind in PAIRABLE and not samples.pairs:
            raise InputError(
                f"{source} was trained on pairs of texts, and {data} has no second ones, which would be in "
                f"column {settings.data.text_pair!r}; if not, data.text_pair = '' in its config.toml says so"
            )
    dataset = build(samples, run, pipeline.checkpoint.tokenizer, pipeline.checkpoint.images)
    for note in dataset.notes:  # of texts that were cut, of words that the vocabulary lacks
        warn(note)
    if not data and _fingerprint(expanded(source)) not in (None, dataset.fingerprint):
        raise InputError(
            f"the data of {source} have changed since it was trained, so it may know some of what is held "
            "out now: score it on others with --data"
        )
    scores: dict[str, float | str] = {"samples": len(samples), **evaluate(Objective(model), dataset)}
    if isinstance(pipeline, Translator):
        translations = pipeline.translate(samples.texts, num_beams=num_beams, truncate=run.data.truncate)
        scores |= {"num_beams": num_beams, **translation_scores(translations, samples.pairs, tokenize)}
    return scores
