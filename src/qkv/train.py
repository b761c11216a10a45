"""The one training loop, for every family and objective, in one process or many.

Everything random is a function of the seed, the step and the rank, so a run that was cut off and
resumed ends with the weights of one that was not.
"""

from __future__ import annotations

import copy
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import FrameType

import numpy as np
import torch

from qkv import hub, lora
from qkv.average import Average, average_of, replaced
from qkv.checkpoint import (
    CONFIG,
    Metrics,
    Progress,
    drop_states,
    load_state,
    save_state,
    saved_states,
    step_of,
    write_text,
)
from qkv.config import BertHead, DataConfig, RunConfig, TrainConfig, read_toml, write_toml
from qkv.data import (
    Cache,
    Dataset,
    MultiTaskDataset,
    Raw,
    Sampler,
    Samples,
    bert_head,
    prefetch,
    prepare,
    read,
    trained_tokenizer,
)
from qkv.data.batches import Batch
from qkv.data.cache import Watch, unwatched
from qkv.data.summary import Summary, summarize
from qkv.distributed import ALONE, Ranks, spread, whole
from qkv.divergence import check_finite, check_trend
from qkv.errors import InputError
from qkv.evaluate import evaluate
from qkv.files import cache_folder, locked, reason
from qkv.hub import Checkpoint
from qkv.images import ImageProcessor
from qkv.layers import Block
from qkv.models import Bert, Model, MultiTaskBert, build
from qkv.objectives import Objective, item_counts
from qkv.observe import Observer
from qkv.optim import learning_rate, optimizers
from qkv.runtime import keep_freed_memory, multiplies_bfloat16, pick_device, seed_all
from qkv.tokenizers import Tokenizer

EXAMPLES = 12
"""How many held-out samples a job keeps to show what the model makes of them."""


@dataclass
class Job:
    """A run made ready: the resolved config, the model with what prepares its input, and the samples."""

    config: RunConfig
    checkpoint: Checkpoint
    train: Dataset
    valid: Dataset
    summaries: dict[str, Summary]
    """What was understood of the data of each task; of those of a single one under the name ""."""
    examples: dict[str, Samples]
    """A few held-out samples of each, to show what the model makes of them."""


def new_job(config: RunConfig, watch: Watch = unwatched) -> Job:
    """Read the data, then make or load what turns it into a model's input, and the model.

    The resolved config has the vocabulary, labels and image size that the data decided, the precision
    that the machine decided, and absolute paths. With `init` the model is the checkpoint's, but for
    its dropouts. watch: told how far the preparation of the data is. Raises InputError for anything that
    cannot work, before any training.
    """
    lora.check(config)
    precision = config.train.precision
    if precision == "auto":
        precision = "bf16" if multiplies_bfloat16(pick_device()) else "fp32"
    data, tasks = _located(config.data), {name: _located(data) for name, data in config.tasks.items()}
    folder = Path(config.init).expanduser()
    init = str(folder.absolute()) if config.init and folder.is_dir() else config.init
    config = replace(
        config, data=data, tasks=tasks, train=replace(config.train, precision=precision), init=init
    )
    raws = _read(config)
    seed_all(config.train.seed)
    cache = Cache(cache_folder() / "data", watch)
    return _job(config, raws, _load(config, raws) if config.init else _fresh(config, raws, cache), cache)


def resumed_job(run: Path, watch: Watch = unwatched) -> Job:
    """The job of a run folder, for `train(..., resume=True)`. Raises InputError if it is not one."""
    config = read_toml(run / CONFIG)
    vit = config.model.family == "vit"
    tokenizer, images = (None, ImageProcessor.load(run)) if vit else (Tokenizer.load(run), None)
    checkpoint = Checkpoint(build(config.model), tokenizer, images)
    return _job(config, _read(config), checkpoint, Cache(cache_folder() / "data", watch))


def _located(data: DataConfig) -> DataConfig:
    return replace(data, path=_absolute(data.path), valid=_absolute(data.valid))


def _absolute(location: str) -> str:
    """A path, or two with a comma between them, that mean the same from every folder."""
    return ",".join(str(Path(part.strip()).expanduser().absolute()) for part in location.split(",") if part)


def _read(config: RunConfig) -> dict[str, Raw]:
    """The data of each task; those of a single one under the name ""."""
    if not config.tasks:
        return {"": read(config.data, config.model.family)}
    raws = {}
    for name, data in config.tasks.items():
        with _blaming(name):
            raws[name] = read(data, config.model.family)
    return raws


@contextmanager
def _blaming(task: str) -> Iterator[None]:
    """Around what is done for one of several tasks: an InputError names it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"task {task}: {error}") from None


def _head(config: RunConfig, raws: dict[str, Raw]) -> tuple[BertHead, tuple[str, ...]]:
    """The head that a Bert has for the data, and its labels; that of an encoder for several tasks."""
    if config.tasks:
        return "pooler", ()
    return bert_head(raws[""].kind), raws[""].labels


def _job(config: RunConfig, raws: dict[str, Raw], checkpoint: Checkpoint, cache: Cache) -> Job:
    """A job of one task, or of several, each made as if alone, over the checkpoint's encoder."""
    if not config.tasks:
        return _task_job(config, raws[""], checkpoint, cache)
    assert isinstance(checkpoint.model, Bert)
    heads = {name: (bert_head(raw.kind), raw.labels) for name, raw in raws.items()}
    model = MultiTaskBert(checkpoint.model, heads)
    jobs = {}
    for name, raw in raws.items():
        with _blaming(name):
            own = replace(checkpoint, model=model.tasks[name])
            jobs[name] = _task_job(config.of_task(name), raw, own, cache)
    labels = {name: raw.labels for name, raw in raws.items()}
    return Job(
        replace(config, model=model.config, tasks={name: job.config.data for name, job in jobs.items()}),
        replace(checkpoint, model=model),
        MultiTaskDataset({name: job.train for name, job in jobs.items()}, labels),
        MultiTaskDataset({name: job.valid for name, job in jobs.items()}, labels),
        {name: job.summaries[""] for name, job in jobs.items()},
        {name: job.examples[""] for name, job in jobs.items()},
    )


def _task_job(config: RunConfig, raw: Raw, checkpoint: Checkpoint, cache: Cache) -> Job:
    model = checkpoint.model.config
    config = replace(config, model=model, data=replace(config.data, task=raw.train.task))
    if raw.kind == "contrastive":
        checkpoint = replace(checkpoint, pooling="mean", normalize=True)
    hub.check_savable(model)
    if model.family == "bert" and model.segments < 2 and raw.reads_pairs:
        raise InputError(f"model.segments is {model.segments}; pairs of texts need 2")
    if config.lora.rank:
        hub.adapt(checkpoint, config.lora, config.init)
    train, valid = prepare(raw, config, checkpoint.tokenizer, checkpoint.images, cache)
    summary = summarize(raw, train, valid)
    return Job(config, checkpoint, train, valid, {"": summary}, {"": raw.valid.spread(EXAMPLES)})


def _load(config: RunConfig, raws: dict[str, Raw]) -> Checkpoint:
    """The checkpoint `init`, with a fresh head for this data's labels and this run's dropouts."""
    head, labels = _head(config, raws)
    bert = config.model.family == "bert"
    loaded = hub.load(config.init, family=config.model.family, head=head if bert else None, labels=labels)
    if config.lora.rank:
        hub.check_base(config.init, fresh=loaded.fresh)
    theirs = loaded.model.config
    given, usual = asdict(config.model), asdict(type(theirs)())
    for name, value in asdict(theirs).items():
        from_data = name in ("head", "labels") or given[name] == 0  # 0 pixels: the images' own
        if name not in _DROPOUTS and not from_data and given[name] not in (value, usual[name]):
            raise InputError(
                f"model.{name} is {given[name]}, but {config.init} has {value}: with init the model is the "
                f"checkpoint's; only {', '.join(_DROPOUTS)} can be set"
            )
    model = build(replace(theirs, **{name: given[name] for name in _DROPOUTS}))
    model.load_state_dict(loaded.model.state_dict())
    return Checkpoint(model, loaded.tokenizer, loaded.images)


_DROPOUTS = ("dropout", "attention_dropout", "drop_path")


def _fresh(config: RunConfig, raws: dict[str, Raw], cache: Cache) -> Checkpoint:
    """A new model, and the tokenizer or image processor that fits the data."""
    model = config.model
    if model.family == "vit":
        raw = raws[""]
        size = model.image_size or _image_size(raw, model.patch_size)
        model = replace(model, image_size=size, channels=raw.channels, labels=raw.labels)
        images = ImageProcessor(size=size, mean=(0.5,) * raw.channels, std=(0.5,) * raw.channels)
        return Checkpoint(build(model), images=images)
    tokenizer = trained_tokenizer(config.tokenizer, model.family, list(raws.values()), cache)
    model = replace(model, vocab_size=tokenizer.vocab_size)
    if model.family == "transformer":
        model = replace(model, pad_id=_need(tokenizer.pad_id), eos_id=_need(tokenizer.eos_id))
    elif model.family == "bert":
        head, labels = _head(config, raws)
        model = replace(model, head=head, labels=labels)
    return Checkpoint(build(model), tokenizer)


def _image_size(raw: Raw, patch_size: int) -> int:
    """The images' own size in whole patches, but at most 16 a side: more would take hours on a CPU."""
    patches = min(raw.image_size // patch_size, 16)
    if not patches:
        raise InputError(
            f"most images have {raw.image_size} pixels a side, less than one patch: lower model.patch_size"
        )
    return patches * patch_size


def _need(token_id: int | None) -> int:
    assert token_id is not None
    return token_id


# ---------------------------------------------------------------- the loop


def begin(job: Job, run: Path) -> None:
    """Make the run folder, with the state before the first step.

    Raises InputError if the folder holds a run already or cannot be written.
    """
    if (run / CONFIG).exists() or any(map(step_of, saved_states(run))):
        raise InputError(
            f"{run} already holds a run: continue it with `qkv train --resume {run}`, or choose another --out"
        )
    model = job.checkpoint.model
    save_state(run, model, [], average_of(model, job.config.train).state, Progress(job.train.fingerprint))
    try:
        for part in (job.checkpoint.tokenizer, job.checkpoint.images):
            if part is not None:
                part.save(run)
    except OSError as error:
        raise InputError(f"cannot write {run}: {reason(error)}") from error
    write_text(run / CONFIG, write_toml(job.config))  # last: what has it can be resumed


def train(job: Job, run: Path, observer: Observer, resume: bool = False, ranks: Ranks = ALONE) -> Progress:
    """Train a job into a run folder, which then holds its best model; returns its step and scores.

    resume: go on from the folder's last state; otherwise the folder is made. Of several ranks the first
    one makes it with `begin`, and all resume. SIGTERM and SIGINT end the loop behind the step in progress
    with its state saved, SIGINT with KeyboardInterrupt. Raises InputError if the folder holds another run,
    has no state to resume, cannot be written or is being written by another process, if the loss diverges
    or stops being a number, and if another rank is lost.
    """
    keep_freed_memory()
    if not resume:
        begin(job, run)
    job.checkpoint.model.to(ranks.device())
    trainer = Trainer(job.config.train, job.checkpoint, job.train, ranks)
    progress = load_state(run, trainer.model, trainer.optimizers, trainer.average.state)
    if progress.data != job.train.fingerprint:
        raise InputError(f"the data of {run} have changed since it began: train anew")
    if progress.step > trainer.config.max_steps:
        raise InputError(
            f"train.max_steps is {trainer.config.max_steps}, but {run} is at step {progress.step}: "
            f"raise it in {run / CONFIG}"
        )
    try:
        _loop(job, trainer, run, observer, progress)
    except RuntimeError as error:
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


@dataclass(frozen=True)
class StepData:
    """What one rank computes on in one optimiser step."""

    epoch: int
    batches: list[tuple[Batch, bool]]
    """One for each forward pass, and whether it counts."""
    tokens: float
    """Of all ranks."""


class Trainer:
    """A checkpoint's model with what trains it, on the device where it is, and spread over the ranks."""

    def __init__(
        self, config: TrainConfig, checkpoint: Checkpoint, dataset: Dataset, ranks: Ranks = ALONE
    ) -> None:
        self.config, self.start, self.dataset, self.ranks = config, checkpoint, dataset, ranks
        self.model: Model = checkpoint.model
        self.device = next(self.model.parameters()).device
        if config.torch_compile and len(np.unique(dataset.costs)) > 1:
            raise InputError("train.torch_compile needs samples of equal length: leave it out for these data")
        for block in (module for module in self.model.modules() if isinstance(module, Block)):
            if config.gradient_checkpointing:
                recomputed = partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)
                block.forward = recomputed  # type: ignore[method-assign]
            if config.torch_compile:
                block.compile()
        self.objective = Objective(self.model, config.label_smoothing_factor, config.r_drop)
        self.bf16 = config.precision == "bf16"
        # The model to save: the first rank's whole copy of one that is spread.
        self.saved = copy.deepcopy(self.model).cpu() if ranks.count > 1 and ranks.first else self.model
        if ranks.count > 1:
            spread(self.objective, ranks, config.shard_ranks, self.bf16)
        self.optimizers = optimizers(self.model, config)
        self.average: Average = average_of(self.model, config)

    def data(self, epoch: int, indices: Sequence[int]) -> StepData:
        """A step's samples as this rank computes on them.

        The ranks and the accumulation divide the samples alike whatever their numbers are. Every rank
        gets equally many parts: where there is none for it, one sample that does not count.
        """
        parts = _divide(indices, self.config.gradient_accumulation_steps * self.ranks.count)
        mine = [(part, True) for part in parts[self.ranks.rank :: self.ranks.count]]
        passes = math.ceil(len(parts) / self.ranks.count)
        mine += [(indices[:1], False)] * (passes - len(mine))
        batches = [(self.dataset.batch(part, epoch).to(self.device), counts) for part, counts in mine]
        return StepData(epoch, batches, float(self.dataset.costs[list(indices)].sum()))

    def step(self, data: StepData, step: int) -> dict[str, float]:
        """One optimiser step over the data of all ranks; what there is to record of it."""
        seed_all(_step_seed(self.config.seed, step, self.ranks.rank))
        self.objective.train()
        loss = self.backward(data.batches)
        norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm))
        (total,) = self.ranks.sum([loss])
        check_finite(step, self.config, total, norm.item())
        rate = learning_rate(step, self.config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.average.update(self.model)
        return {
            "epoch": data.epoch,
            "loss": total,
            "grad_norm": norm.item(),
            "learning_rate": rate,
            "tokens": data.tokens,
        }

    def backward(self, batches: Sequence[tuple[Batch, bool]]) -> float:
        """Add the gradients of a step's loss to the parameters'; this rank's share of the loss."""
        names = list(item_counts(batches[0][0]))
        own = [sum(item_counts(batch)[name] for batch, counts in batches if counts) for name in names]
        totals = dict(zip(names, map(int, self.ranks.sum(own)), strict=True))
        loss = torch.zeros((), device=self.device)
        for number, (batch, counts) in enumerate(batches, start=1):
            if self.ranks.count > 1:
                self.objective.set_requires_gradient_sync(number == len(batches))  # type: ignore[operator]
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                part = self.objective(batch, totals) * float(counts)
            part.backward()
            loss += part.detach()
        return loss.item()

    def checkpoint(self) -> Checkpoint | None:
        """The model with the weights that it has now, whole; on ranks but the first None."""
        if self.ranks.count > 1:
            weights = {name: whole(tensor.detach()).cpu() for name, tensor in self.model.state_dict().items()}
            if not self.ranks.first:
                return None
            self.saved.load_state_dict(weights)
        return replace(self.start, model=self.saved)


def _loop(job: Job, trainer: Trainer, run: Path, observer: Observer, progress: Progress) -> None:
    """Steps, scores and saved states from where `progress` is to the end."""
    config, ranks = trainer.config, trainer.ranks
    sampler = Sampler(job.train.costs, config.batch_tokens, config.seed, job.train.groups)
    todo = islice(sampler.batches(progress.step), config.max_steps - progress.step)
    for task, summary in job.summaries.items():
        observer.say(f"{task}: {summary.text()}" if task else summary.text())
    started = time.monotonic() - progress.seconds
    with (
        _sole_writer(run) if ranks.first else nullcontext(),
        _interruptible() as interruption,
        _closing(observer),
        prefetch(lambda item: trainer.data(*item), todo) as stream,
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
            if metrics and (step % config.logging_steps == 0 or progress.finished or step == 1):
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
        scores = evaluate(trainer.objective, job.valid)
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
            observer.evaluated(step, scores, checkpoint)
    waited = (step - progress.best_step) // config.eval_steps
    if 0 < config.early_stopping_patience <= waited and not progress.finished:
        progress.finished = True
        observer.say(f"Stopped at step {step}: no better score since step {progress.best_step}.")


def _drop_states(run: Path, trainer: Trainer) -> None:
    """Keep the states that the settings ask for."""
    config = trainer.config
    if trainer.ranks.first:
        drop_states(run, max(config.save_total_limit, config.average_checkpoints), config.save_steps)


def _divide(indices: Sequence[int], parts: int) -> list[Sequence[int]]:
    """Contiguous parts of nearly equal size, none empty."""
    size = math.ceil(len(indices) / parts)
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def _step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of one step on one rank: a hash of 63 bits."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> np.uint64(1))


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
        with suppress(InputError):
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
