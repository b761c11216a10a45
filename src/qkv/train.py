"""The one training loop, for every family and objective.

Everything random is a function of the seed and the step, so a run that was cut off and resumed
ends with the weights of one that was not.
"""

from __future__ import annotations

import hashlib
import math
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from qkv import hub
from qkv.checkpoint import CONFIG, Metrics, Progress, load_state, save_state, write_text
from qkv.config import BertHead, RunConfig, read_toml, write_toml
from qkv.data import Dataset, Raw, Sampler, Samples, prepare, read
from qkv.data.batches import Batch
from qkv.data.summary import Summary, summarize
from qkv.divergence import LossTrend, check_finite, check_trend
from qkv.errors import InputError
from qkv.evaluate import evaluate
from qkv.hub import Checkpoint
from qkv.images import ImageProcessor
from qkv.models import build
from qkv.objectives import item_counts, loss_terms
from qkv.observe import Observer
from qkv.optim import learning_rate, optimizers
from qkv.runtime import multiplies_bfloat16, pick_device, seed_all
from qkv.tokenizers import Tokenizer, train_tokenizer

EXAMPLES = 12
"""How many held-out samples a job keeps to show what the model makes of them."""


@dataclass
class Job:
    """A run made ready: the resolved config, the model with what prepares its input, and the samples."""

    config: RunConfig
    checkpoint: Checkpoint
    train: Dataset
    valid: Dataset
    summary: Summary
    """What was understood of the data."""
    examples: Samples
    """A few held-out samples, to show what the model makes of them."""


def new_job(config: RunConfig) -> Job:
    """Read the data, then make or load what turns it into a model's input, and the model.

    The resolved config has the vocabulary, labels and image size that the data decided, the precision
    that the machine decided, and absolute paths. With `init` the model is the checkpoint's, but for
    dropout and attention_dropout. Raises InputError for anything that cannot work, before any training.
    """
    precision = config.train.precision
    if precision == "auto":
        precision = "bf16" if multiplies_bfloat16(pick_device()) else "fp32"
    data = replace(config.data, path=_absolute(config.data.path), valid=_absolute(config.data.valid))
    config = replace(config, data=data, train=replace(config.train, precision=precision))
    raw = read(config.data, config.model.family)
    seed_all(config.train.seed)
    return _job(config, raw, _load(config, raw) if config.init else _fresh(config, raw))


def resumed_job(run: Path) -> Job:
    """The job of a run folder, for `train(..., resume=True)`. Raises InputError if it is not one."""
    config = read_toml(run / CONFIG)
    vit = config.model.family == "vit"
    tokenizer, images = (None, ImageProcessor.load(run)) if vit else (Tokenizer.load(run), None)
    raw = read(config.data, config.model.family)
    return _job(config, raw, Checkpoint(build(config.model), tokenizer, images))


def _absolute(location: str) -> str:
    """A path, or two with a comma between them, that mean the same from every folder."""
    return ",".join(str(Path(part.strip()).expanduser().absolute()) for part in location.split(",") if part)


def _job(config: RunConfig, raw: Raw, checkpoint: Checkpoint) -> Job:
    model = checkpoint.model.config
    config = replace(config, model=model)
    hub.check_savable(model)
    if model.family == "bert" and model.segments < 2 and (raw.kind == "text" or raw.train.pairs):
        raise InputError(f"model.segments is {model.segments}; pairs of texts need 2")
    train, valid = prepare(raw, config, checkpoint.tokenizer, checkpoint.images)
    summary = summarize(raw, train, valid)
    return Job(config, checkpoint, train, valid, summary, raw.valid.spread(EXAMPLES))


def _load(config: RunConfig, raw: Raw) -> Checkpoint:
    """The checkpoint `init`, with a fresh head for this data's labels and this run's dropout."""
    head = _bert_head(raw) if config.model.family == "bert" else None
    loaded = hub.load(config.init, family=config.model.family, head=head, labels=raw.labels)
    theirs = loaded.model.config
    given, usual = asdict(config.model), asdict(type(theirs)())
    for name, value in asdict(theirs).items():
        from_data = name in ("head", "labels") or given[name] == 0  # 0 pixels: the images' own
        if name not in _DROPOUTS and not from_data and given[name] not in (value, usual[name]):
            raise InputError(
                f"model.{name} is {given[name]}, but {config.init} has {value}: with init the model is the "
                f"checkpoint's; only {' and '.join(_DROPOUTS)} can be set"
            )
    model = build(replace(theirs, **{name: given[name] for name in _DROPOUTS}))
    model.load_state_dict(loaded.model.state_dict())
    return Checkpoint(model, loaded.tokenizer, loaded.images)


_DROPOUTS = ("dropout", "attention_dropout")


def _fresh(config: RunConfig, raw: Raw) -> Checkpoint:
    """A new model, and the tokenizer or image processor that fits the data."""
    model = config.model
    if model.family == "vit":
        size = model.image_size or _image_size(raw, model.patch_size)
        model = replace(model, image_size=size, channels=raw.channels, labels=raw.labels)
        images = ImageProcessor(size=size, mean=(0.5,) * raw.channels, std=(0.5,) * raw.channels)
        return Checkpoint(build(model), images=images)
    tokenizer = train_tokenizer(config.tokenizer, model.family, raw.texts())
    model = replace(model, vocab_size=tokenizer.vocab_size)
    if model.family == "transformer":
        model = replace(model, pad_id=_need(tokenizer.pad_id), eos_id=_need(tokenizer.eos_id))
    elif model.family == "bert":
        model = replace(model, head=_bert_head(raw), labels=raw.labels)
    return Checkpoint(build(model), tokenizer)


def _image_size(raw: Raw, patch_size: int) -> int:
    """The images' own size in whole patches, but at most 16 a side: more would take hours on a CPU."""
    patches = min(raw.image_size // patch_size, 16)
    if not patches:
        raise InputError(
            f"most images have {raw.image_size} pixels a side, less than one patch: lower model.patch_size"
        )
    return patches * patch_size


def _bert_head(raw: Raw) -> BertHead:
    return "classification" if raw.kind == "labelled" else "pretraining"


def _need(token_id: int | None) -> int:
    assert token_id is not None
    return token_id


def _fingerprint(dataset: Dataset) -> str:
    """Changes, as good as always, if the data or the tokenizer do: a hash of all samples' lengths."""
    return hashlib.sha256(dataset.costs.tobytes()).hexdigest()[:16]


def train(job: Job, run: Path, observer: Observer, resume: bool = False) -> Progress:
    """Train a job into a run folder, which then holds its best model; returns its step and scores.

    SIGINT and SIGTERM end the loop behind the step in progress with its state saved; then
    KeyboardInterrupt is raised. Raises InputError if the folder holds another run, has no state to
    resume, or cannot be written, and if the loss diverges or stops being a number.
    """
    config = job.config.train
    device = pick_device()
    model = job.checkpoint.model.to(device)
    steppers = optimizers(model, config)
    if resume:
        progress = load_state(run, model, steppers)
        if progress.data != _fingerprint(job.train):
            raise InputError(f"the data at {job.config.data.path} have changed since {run} began: train anew")
    elif (run / CONFIG).exists():
        raise InputError(
            f"{run} already holds a run: continue it with `qkv train --resume {run}`, or choose another --out"
        )
    else:
        progress = Progress(_fingerprint(job.train))
        write_text(run / CONFIG, write_toml(job.config))
        for part in (job.checkpoint.tokenizer, job.checkpoint.images):
            if part is not None:
                part.save(run)
        save_state(run, model, steppers, progress)
    metrics = Metrics(run, progress.step)
    trend = LossTrend(**progress.trend)
    sampler = Sampler(job.train.costs, config.batch_tokens, config.seed)
    observer.say(job.summary.text())
    started = time.monotonic() - progress.seconds
    with _interruptible() as interrupted, closing(observer):
        observer.begin(job.config, progress.step)
        for epoch, indices in sampler.batches(progress.step):
            if progress.step == config.max_steps:
                break
            step = progress.step + 1
            rate = learning_rate(step, config)
            record = _step(job, model, steppers, epoch, indices, step, rate)
            progress.step = step
            progress.seconds = time.monotonic() - started
            record |= {"step": step, "epoch": epoch, "learning_rate": rate, "seconds": progress.seconds}
            observer.step(step, record)
            last = step == config.max_steps
            if step % config.logging_steps == 0 or last or step == 1:
                metrics.add(record)
            trend.add(record["loss"])
            check_trend(step, config, trend)
            progress.trend = asdict(trend)
            if step % config.eval_steps == 0 or last:
                scores = evaluate(model, job.valid)
                check_finite(step, config, scores["loss"])
                if scores["loss"] < progress.best_scores.get("loss", math.inf):
                    progress.best_step, progress.best_scores = step, scores
                    hub.save(run, job.checkpoint)
                progress.seconds = time.monotonic() - started
                valid = {f"valid_{name}": score for name, score in scores.items()}
                metrics.add({"step": step, "seconds": progress.seconds} | valid)
                observer.evaluated(step, scores, job.checkpoint)
            if step % config.save_steps == 0 or last or interrupted.is_set():
                save_state(run, model, steppers, progress)
            if interrupted.is_set() and not last:
                raise KeyboardInterrupt
    if progress.best_step != config.max_steps:
        observer.say(
            f"{run} holds the model of step {progress.best_step}, which had the lowest held-out loss."
        )
    return progress


def _step(
    job: Job,
    model: torch.nn.Module,
    steppers: list[torch.optim.Optimizer],
    epoch: int,
    indices: list[int],
    step: int,
    rate: float,
) -> dict[str, float]:
    """One optimiser step over the samples `indices`; returns its loss, gradient norm and number of tokens."""
    config = job.config.train
    device = next(model.parameters()).device
    seed_all(_step_seed(config.seed, step))
    model.train()
    pieces = [job.train.batch(part, epoch) for part in _divide(indices, config.gradient_accumulation_steps)]
    counts: Counter[str] = sum((Counter(item_counts(piece)) for piece in pieces), Counter())
    loss = torch.zeros((), device=device)
    for piece in pieces:
        piece_loss = _loss(job, piece.to(device), counts)
        piece_loss.backward()  # type: ignore[no-untyped-call]
        loss += piece_loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    check_finite(step, config, loss.item(), norm.item())
    for optimizer in steppers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {"loss": loss.item(), "grad_norm": norm.item(), "tokens": float(job.train.costs[indices].sum())}


def _loss(job: Job, batch: Batch, counts: Mapping[str, int]) -> Tensor:
    """The batch's share of the step's loss: each term's sum over the step's number of items."""
    config = job.config.train
    model = job.checkpoint.model
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        terms = loss_terms(model, batch)
    smoothing = config.label_smoothing_factor
    return torch.stack([term.loss_sum(smoothing) / counts[name] for name, term in terms.items()]).sum()


def _divide(indices: list[int], parts: int) -> list[list[int]]:
    """Contiguous parts of nearly equal size, none empty."""
    size = math.ceil(len(indices) / parts)
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def _step_seed(seed: int, step: int) -> int:
    """The seed of one step: distinct for distinct (seed, step), both below 2^31."""
    return (seed << 31) | step


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set in the main thread; a second signal acts as usual."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, handle)
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
