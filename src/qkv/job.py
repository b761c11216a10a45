"""A run made ready: from its settings to data sets, model and tokenizer, or an error before any training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from qkv import hub, lora
from qkv.checkpoint import CONFIG
from qkv.config import BertHead, DataConfig, RunConfig, TrainConfig, read_toml
from qkv.data import (
    Cache,
    Dataset,
    MultiTaskDataset,
    Raw,
    Samples,
    bert_head,
    prepare,
    read,
    trained_tokenizer,
)
from qkv.data.files import paths_of
from qkv.data.raw import PAIRABLE
from qkv.data.summary import Summary, summarize
from qkv.errors import InputError
from qkv.files import cache_folder, expanded
from qkv.growth import check as check_growth
from qkv.hub import Checkpoint
from qkv.hub.folder import locate
from qkv.hub.sentence import CONTRASTIVE, check_contrastive
from qkv.images import ImageProcessor
from qkv.models import Bert, MultiTaskBert, build
from qkv.runtime import multiplies_bfloat16, pick_device
from qkv.tokenizers import Tokenizer
from qkv.watch import Watch, unwatched

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
    if config.init and config.tokenizer.path:
        raise InputError("with init the tokenizer is the checkpoint's: leave out tokenizer.path")
    precision = config.train.precision
    if precision == "auto":
        precision = "bf16" if multiplies_bfloat16(pick_device()) else "fp32"
    data, tasks = _located(config.data), {name: _located(data) for name, data in config.tasks.items()}
    config = replace(
        config,
        data=data,
        tasks=tasks,
        tokenizer=replace(config.tokenizer, path=_folder_or_id(config.tokenizer.path)),
        train=replace(config.train, precision=precision),
        init=_folder_or_id(config.init),
    )
    raws = _read(config)
    if config.train.temperature != TrainConfig.temperature and not _is_contrastive(raws):
        raise InputError("train.temperature is for contrastive learning: leave it out")
    torch.manual_seed(config.train.seed)
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
    return ",".join(str(expanded(path).absolute()) for path in paths_of(location) if path)


def _folder_or_id(source: str) -> str:
    """A checkpoint's folder as an absolute path; anything else as it is."""
    path = expanded(source)
    return str(path.absolute()) if source and path.is_dir() else source


def _read(config: RunConfig) -> dict[str, Raw]:
    """The data of each task; those of a single one under the name ""."""
    if not config.tasks:
        return {"": read(config.data, config.model.family)}
    raws = {}
    for name, data in config.tasks.items():
        if not data.path:
            raise InputError(f"no data: name a file or folder with tasks.{name}.path")
        with _blaming(name):
            raws[name] = read(data, config.model.family)
    return raws


def _is_contrastive(raws: dict[str, Raw]) -> bool:
    """Whether a task is to find the texts that belong together."""
    return any(raw.kind == "contrastive" for raw in raws.values())


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
    unpaired = raw.kind in PAIRABLE and not raw.train.pairs
    second = "" if unpaired else config.data.text_pair
    config = replace(config, model=model, data=replace(config.data, task=raw.train.task, text_pair=second))
    if raw.kind == "contrastive":
        checkpoint = replace(checkpoint, pooling=CONTRASTIVE)
    hub.check_savable(model)
    check_growth(config.train, model)
    if model.family == "bert" and model.segments < 2 and raw.reads_pairs:
        raise InputError(f"model.segments is {model.segments}; pairs of texts need 2")
    if config.lora.rank:
        hub.adapt(checkpoint, config.lora, config.init)
    train, valid = prepare(raw, config, checkpoint.tokenizer, checkpoint.images, cache)
    if config.train.torch_compile and len(np.unique(train.costs)) > 1:
        raise InputError("train.torch_compile needs samples of equal length: leave it out for these data")
    summary = summarize(raw, train, valid)
    return Job(config, checkpoint, train, valid, {"": summary}, {"": raw.valid.spread(EXAMPLES)})


def _load(config: RunConfig, raws: dict[str, Raw]) -> Checkpoint:
    """The checkpoint `init`, with a fresh head for this data's labels and this run's dropouts."""
    head, labels = _head(config, raws)
    bert = config.model.family == "bert"
    loaded = hub.load(
        config.init, families=(config.model.family,), head=head if bert else None, labels=labels
    )
    if config.lora.rank:
        hub.check_base(config.init, fresh=loaded.fresh)
    if _is_contrastive(raws):
        check_contrastive(loaded.pooling, config.init)
    theirs = loaded.model.config
    given, usual = asdict(config.model), asdict(type(theirs)())
    for name, value in asdict(theirs).items():
        from_data = name in ("head", "labels") or (name == "image_size" and given[name] == 0)
        if name not in theirs.dropouts and not from_data and given[name] not in (value, usual[name]):
            raise InputError(
                f"model.{name} is {given[name]}, but {config.init} has {value}: with init the model is the "
                f"checkpoint's; only {', '.join(theirs.dropouts)} can be set"
            )
    model = build(replace(theirs, **config.model.dropouts))
    model.load_state_dict(loaded.model.state_dict())
    return Checkpoint(model, loaded.tokenizer, loaded.images, fresh=loaded.fresh)


def _fresh(config: RunConfig, raws: dict[str, Raw], cache: Cache) -> Checkpoint:
    """A new model, and the tokenizer or image processor that fits the data."""
    model = config.model
    if model.family == "vit":
        raw = raws[""]
        size = model.image_size or _image_size(raw, model.patch_size)
        model = replace(model, image_size=size, channels=raw.channels, labels=raw.labels)
        images = ImageProcessor(size=size, mean=(0.5,) * raw.channels, std=(0.5,) * raw.channels)
        return Checkpoint(build(model), images=images)
    tokenizer = _tokenizer(config, raws, cache)
    model = replace(model, vocab_size=tokenizer.vocab_size)
    if model.family == "transformer":
        model = replace(model, pad_id=_need(tokenizer.pad_id), eos_id=_need(tokenizer.eos_id))
    elif model.family == "bert":
        head, labels = _head(config, raws)
        model = replace(model, head=head, labels=labels)
    return Checkpoint(build(model), tokenizer)


def _tokenizer(config: RunConfig, raws: dict[str, Raw], cache: Cache) -> Tokenizer:
    """That of the folder that the config names, or one trained on the data."""
    family, path = config.model.family, config.tokenizer.path
    if not path:
        return trained_tokenizer(config.tokenizer, family, list(raws.values()), cache)
    tokenizer = Tokenizer.load(locate(path))
    if lacking := tokenizer.lacking(family):
        raise InputError(
            f"the tokenizer of {path} has no {lacking[0]} token, which a {family} needs: choose another "
            "tokenizer.path"
        )
    if tokenizer.encode("a").ids != tokenizer.framed("a", family):
        raise InputError(
            f"the tokenizer of {path} frames a text with other tokens than a {family} learns it with: choose "
            "another tokenizer.path"
        )
    return tokenizer


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
