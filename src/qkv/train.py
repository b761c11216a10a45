"""The one training loop, for every family and objective.

Everything random is a function of the seed, the step and the rank, so a run that was cut off and
resumed ends with the weights of one that was not.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import FrameType

import torch

from qkv import hub
from qkv.average import average_of, replaced
from qkv.checkpoint import (
    CONFIG,
    Metrics,
    Progress,
    drop_states,
    load_state,
    save_state,
    saved_states,
    step_of,
)
from qkv.config import TrainConfig, ViTConfig, write_toml
from qkv.data import MultiTaskDataset, Sampler, prefetch
from qkv.data.cache import fingerprint
from qkv.data.contrastive import ContrastiveDataset
from qkv.distributed import ALONE, Ranks
from qkv.divergence import check_finite, check_trend
from qkv.errors import InputError
from qkv.evaluate import evaluate
from qkv.files import locked, reason, replace_text
from qkv.hub.folder import holds_checkpoint
from qkv.job import Job
from qkv.observe import Observer
from qkv.runtime import keep_few_kernels, keep_freed_memory
from qkv.trainer import Trainer


def begin(job: Job, run: Path) -> None:
    """Make the run folder, with the state before the first step.

    Raises InputError if the folder holds a run or a checkpoint already or cannot be written.
    """
    if (run / CONFIG).exists() or any(map(step_of, saved_states(run))):
        raise InputError(
            f"{run} already holds a run: continue it with `qkv train --resume {run}`, or choose another --out"
        )
    for folder in (run, *(run / task for task in job.config.tasks)):
        if holds_checkpoint(folder):
            raise InputError(f"{folder} holds a checkpoint, which would be lost: choose another --out")
    model = job.checkpoint.model
    tasks = job.valid.tasks if isinstance(job.valid, MultiTaskDataset) else {"": job.valid}
    held_out = {name: task.fingerprint for name, task in tasks.items()}
    progress = Progress(_data_of(job), held_out)
    save_state(run, model, [], average_of(model, job.config.train).state, progress)
    try:
        for part in (job.checkpoint.tokenizer, job.checkpoint.images):
            if part is not None:
                part.save(run)
    except OSError as error:
        raise InputError(f"cannot write {run}: {reason(error)}") from error
    replace_text(run / CONFIG, write_toml(job.config))  # last: what has it can be resumed


def train(job: Job, run: Path, observer: Observer, resume: bool = False, ranks: Ranks = ALONE) -> Progress:
    """Train a job into a run folder, which then holds its best model; returns its step and scores.

    resume: go on from the folder's last state; otherwise the folder is made. Of several ranks the first
    one makes it with `begin`, and all resume. SIGTERM and SIGINT end the loop behind the step in progress
    with its state saved, SIGINT with KeyboardInterrupt. Raises InputError if the folder holds another run,
    has no state to resume, cannot be written or is being written by another process, if the loss diverges
    or stops being a number, and if another rank is lost.
    """
    keep_few_kernels()
    keep_freed_memory()
    if not resume:
        begin(job, run)
    job.checkpoint.model.to(ranks.device())
    trainer = Trainer(job.config.train, job.checkpoint, job.train, ranks)
    progress = load_state(run, trainer.model, trainer.optimizers, trainer.average.state)
    if progress.data != _data_of(job):
        raise InputError(f"the data of {run} have changed since it began: train anew")
    if progress.step > trainer.config.max_steps:
        raise InputError(
            f"train.max_steps is {trainer.config.max_steps}, but {run} is at step {progress.step}: "
            f"raise it in {run / CONFIG}"
        )
    # The settings may have been raised since.
    exhausted = _exhausted(progress, trainer.config)
    progress.finished = progress.step == trainer.config.max_steps or exhausted
    if exhausted and progress.step < trainer.config.max_steps:
        observer.say(
            f"No better score since step {progress.best_step}: raise train.early_stopping_patience in "
            f"{run / CONFIG} to go on behind step {progress.step}."
        )
    try:
        _loop(job, trainer, run, observer, progress)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):  # GPU, CPU
            raise InputError(
                f"out of memory behind step {progress.step}: raise train.gradient_accumulation_steps in "
                f"{run / CONFIG}, or switch train.gradient_checkpointing on; then continue with "
                f"--resume {run}"
            ) from error
        if ranks.count > 1:
            raise InputError(
                f"behind step {progress.step} {ranks.failure(error)}: "
                f"mend the cause, then continue with --resume {run}"
            ) from error
        raise
    if progress.finished and progress.best_step != progress.step:
        observer.say(
            f"{run} holds the model of step {progress.best_step}, which had the lowest held-out loss."
        )
    return progress


def _data_of(job: Job) -> str:
    """Fingerprint of what is trained on, and of what scores it."""
    return fingerprint(job.train.fingerprint, job.valid.fingerprint)


def _loop(job: Job, trainer: Trainer, run: Path, observer: Observer, progress: Progress) -> None:
    """Steps, scores and saved states from where `progress` is to the end."""
    config, ranks = trainer.config, trainer.ranks
    sampler = Sampler(job.train.costs, config.batch_tokens, config.seed, job.train.groups)
    todo = islice(sampler.batches(progress.step), config.max_steps - progress.step)
    # On a CPU a second thread takes more time from the step than making a batch does (benchmarks/data.py).
    ahead = 0 if trainer.device.type == "cpu" else 2
    for task, summary in job.summaries.items():
        observer.say(f"{task}: {summary.text()}" if task else summary.text())
    if job.checkpoint.fresh:
        parts = dict.fromkeys(name.partition(".")[0] for name in job.checkpoint.fresh)
        observer.say(f"Not in {job.config.init}, so with new random weights: {', '.join(parts)}.")
    observer.say(_extent(job, sampler))
    started = time.monotonic() - progress.seconds
    with (
        _sole_writer(run) if ranks.first else nullcontext(),
        _interruptible() as interruption,
        _closing(observer),
        prefetch(lambda item: trainer.data(*item), todo, ahead) as stream,
    ):
        metrics = Metrics(run, progress.step) if ranks.first else None
        _drop_states(run, trainer)  # those that a killed process was about to
        observer.begin(job.config, progress.step)
        first = progress.step + 1
        while not progress.finished:
            step = progress.step + 1
            record = trainer.step(next(stream), step)
            progress.step = step
            if config.torch_compile and step == first:
                warm_up = time.monotonic() - started - progress.seconds
                observer.say(f"The first step, with compilation, took {warm_up:.0f} s.")
            progress.seconds = time.monotonic() - started
            progress.finished = step == config.max_steps
            record |= {"step": step, "seconds": progress.seconds}
            observer.step(step, record)
            if metrics and config.records(step):
                metrics.add(record)
            progress.trend.add(record["loss"])
            check_trend(step, config, progress.trend)
            if step % config.eval_steps == 0 or progress.finished:
                _evaluate(job, trainer, run, observer, progress, metrics, started)
            # Any rank's signal stops all of them behind the same step.
            number = ranks.max(interruption.number)
            if step % config.save_steps == 0 or progress.finished or number:
                save_state(run, trainer.model, trainer.optimizers, trainer.average.state, progress, ranks)
                _drop_states(run, trainer)
            if number and not progress.finished:
                if number == signal.SIGINT:
                    raise KeyboardInterrupt
                return


def _extent(job: Job, sampler: Sampler) -> str:
    """How far the run goes through its data, for the user."""
    config, tokens = job.config.train, int(job.train.costs.sum())
    epochs = config.max_steps / len(sampler.epoch(0))
    text = (
        f"{tokens:,} tokens, room for {config.batch_tokens:,} in a step: the run goes through them "
        f"{epochs:,.1f} times."
    )
    if (largest := int(job.train.costs.max())) > config.batch_tokens:
        whole = "group of data.candidates" if isinstance(job.train, ContrastiveDataset) else "sample"
        text += f" A step has up to {largest:,} of them, as no {whole} is divided."
    if config.warmup_steps >= config.max_steps:
        text += " The learning rate is still rising when it ends: lower train.warmup_steps."
    if config.average_checkpoints > 1 and config.save_steps >= config.max_steps:
        text += " No state is saved before it ends, so none is averaged: lower train.save_steps."
    if isinstance(model := job.config.model, ViTConfig):
        text = f"Each image is read as {model.image_size} x {model.image_size} pixels. {text}"
    return text


def _evaluate(
    job: Job,
    trainer: Trainer,
    run: Path,
    observer: Observer,
    progress: Progress,
    metrics: Metrics | None,
    started: float,
) -> None:
    """Score the averaged weights; if they are the best so far, they go into the run folder."""
    config, step = trainer.config, progress.step
    with replaced(trainer.model, trainer.average.weights(trainer.model, run)):
        # Weights that are gathered in bfloat16 are multiplied so; otherwise scores are float32.
        gathered = trainer.bf16 and trainer.ranks.count > 1
        with torch.autocast(trainer.device.type, torch.bfloat16, enabled=gathered):
            # Without a backward pass there is room for twice the tokens.
            parts = config.gradient_accumulation_steps * trainer.ranks.count
            tokens = min(8192, 2 * max(1, config.batch_tokens // parts))
            scores = evaluate(trainer.objective, job.valid, tokens, trainer.ranks)
        check_finite(step, config, scores["loss"])
        checkpoint = trainer.checkpoint()
        if scores["loss"] < progress.best_scores.get("loss", math.inf):
            progress.best_step, progress.best_scores = step, scores
            if checkpoint:
                hub.save(run, checkpoint)
        progress.seconds = time.monotonic() - started
        if metrics:
            valid = {f"valid_{name}": score for name, score in scores.items()}
            metrics.add({"step": step, "seconds": progress.seconds} | valid)
        if checkpoint:
            # Compiled blocks fail at caches whose lengths change, as they do where text is made.
            eager = torch.compiler.set_stance("force_eager") if config.torch_compile else nullcontext()
            with eager:
                observer.evaluated(step, scores, checkpoint)
    if _exhausted(progress, config) and not progress.finished:
        progress.finished = True
        observer.say(f"Stopped at step {step}: no better score since step {progress.best_step}.")


def _exhausted(progress: Progress, config: TrainConfig) -> bool:
    """Whether the patience with scores that are not better is at its end."""
    waited = progress.step // config.eval_steps - progress.best_step // config.eval_steps
    return 0 < config.early_stopping_patience <= waited


def _drop_states(run: Path, trainer: Trainer) -> None:
    """Keep the states that the settings ask for."""
    config = trainer.config
    if trainer.ranks.first:
        drop_states(run, max(config.save_total_limit, config.average_checkpoints), config.save_steps)


@contextmanager
def _sole_writer(run: Path) -> Iterator[None]:
    """Keep other processes from training in a run folder. Raises InputError if one does."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(run))
        except BlockingIOError:
            raise InputError(f"another process is training in {run}: wait until it is done") from None
        except OSError:  # a file system without locks
            pass
        yield


@contextmanager
def _closing(observer: Observer) -> Iterator[None]:
    """Close the observer in any case; whatever went wrong before that is what the user hears of."""
    try:
        yield
    except BaseException:
        with suppress(Exception):
            observer.close()
        raise
    observer.close()


@dataclass
class _Interruption:
    """The signal that asked the run to stop; 0: none."""

    number: int = 0


@contextmanager
def _interruptible() -> Iterator[_Interruption]:
    """Remember SIGINT or SIGTERM in the main thread; a second signal acts as usual."""
    interruption = _Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        interruption.number = number
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, handle)
    try:
        yield interruption
    finally:
        restore()
