"""Checkpoints in and out: folders that transformers, vLLM and sentence-transformers open as they are.

`load` reads a folder or a Hub id, strictly; `opened` lets the caller say when which tensors are read; `save`
writes a folder whole. The formats are `gpt2`, `openai-gpt`, `persimmon`, `bert`, `vit`, `extended_vit`,
`marian` and `rotary_marian`, one table each in the files beside this one, and
peft's adapters of them. A format that transformers lacks has its code in `code/`, which `save` puts into the
folder for transformers to run; `load` never runs any.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

from qkv import files, images
from qkv.config import (
    AnyModelConfig,
    BertConfig,
    BertHead,
    Family,
    GPTConfig,
    LoraConfig,
    TransformerConfig,
    ViTConfig,
)
from qkv.errors import InputError
from qkv.hub import adapters, sentence
from qkv.hub import folder as folders
from qkv.hub.adapters import Adapter
from qkv.hub.bert import BERT
from qkv.hub.gpt import GPT1, GPT2, Persimmon
from qkv.hub.marian import Marian, RotaryMarian
from qkv.hub.sentence import CONTRASTIVE, Pooling
from qkv.hub.table import Format
from qkv.hub.vit import VIT, ExtendedViT
from qkv.images import ImageProcessor
from qkv.lora import HEAD
from qkv.lora import adapt as add_adapters
from qkv.models import Bert, Model, MultiTaskBert, Transformer, ViT, allocate, build
from qkv.models.bert import LABELLED
from qkv.tokenizers import VOCABULARIES, Tokenizer
from qkv.unread import Unread

_ALL: tuple[Format[Any], ...] = (
    GPT2(),
    GPT1(),
    Persimmon(),
    BERT(),
    VIT(),
    ExtendedViT(),
    Marian(),
    RotaryMarian(),
)
_FORMATS = {format.model_type: format for format in _ALL}
_CODE = Path(__file__).with_name("code")
_HEADS = ("pooler", "words", "next_sentence", "classifier")
"""Modules that may be absent from a checkpoint if the caller asks for a head."""


@dataclass
class Checkpoint:
    """A model and what it needs to be used."""

    model: Model
    tokenizer: Tokenizer | None = None
    images: ImageProcessor | None = None
    pooling: Pooling | None = None
    """How a sentence-transformers folder makes one vector of a text; None: it is not such a folder."""
    fresh: tuple[str, ...] = ()
    """Our names of tensors that the checkpoint did not have: those of a head that was asked for."""
    files: tuple[Path, ...] = ()
    """What its tensors are from; empty: no files."""
    base: str = ""
    """Folder or Hub id of the checkpoint that the model's adapters belong to; such a model's folder has only
    what it learned."""


def load(
    source: str | Path,
    *,
    families: Collection[Family] = (),
    head: BertHead | None = None,
    labels: tuple[str, ...] = (),
    revision: str | None = None,
) -> Checkpoint:
    """A checkpoint from a folder or a Hub id, which huggingface_hub downloads and keeps in its cache.

    Where that is an adapter in peft's format, the checkpoint is its base with the adapter in the weights.

    families: the only ones that will do; (): all.
    head, labels: ask for this head of BERT, or classes of BERT or ViT; what of it the checkpoint does not
    have gets fresh weights. Without them the head that the checkpoint declares must be there.
    revision: branch, tag or commit of a Hub id. Tensors come as float32 whatever they are on disk.

    Raises InputError for anything that is missing, unexpected, misshapen, or not supported, and for an
    adapter that was trained with another head or other labels than are asked for.
    """
    with opened(source, families=families, head=head, labels=labels, revision=revision) as (
        checkpoint,
        unread,
    ):
        unread.into(checkpoint.model)
    return checkpoint


@contextmanager
def opened(
    source: str | Path,
    *,
    families: Collection[Family] = (),
    head: BertHead | None = None,
    labels: tuple[str, ...] = (),
    revision: str | None = None,
) -> Iterator[tuple[Checkpoint, Unread]]:
    """As `load`, but the model waits for its tensors: they can be read one module after the other.

    The files are open until the end of the `with`. Of an adapter all has been read.
    """
    heads = (head,) if head else ()
    found = folders.locate(source, revision)
    if (adapter := adapters.read(found)) is not None:
        yield _load_adapted(found, adapter, families, heads, labels), Unread({})
        return
    with _opened_whole(source, found, families, heads, labels) as whole:
        yield whole


@contextmanager
def _opened_whole(
    source: str | Path,
    found: Path,
    families: Collection[Family],
    heads: tuple[BertHead, ...],
    labels: tuple[str, ...],
    unnamed: tuple[str, ...] = (),
) -> Iterator[tuple[Checkpoint, Unread]]:
    """The checkpoint in the folder `found`. unnamed: names of the head's outputs, if nobody names as many."""
    own = sentence.read(found)
    folder = own.folder
    theirs = files.read_json(folder / folders.CONFIG)
    with files.blame(folder / folders.CONFIG):
        if (model_type := theirs.get("model_type")) not in _FORMATS:
            raise InputError(f"model_type is {model_type!r}; supported are {', '.join(_FORMATS)}")
        format = _FORMATS[model_type]
        settings = format.fields.read(theirs)
    weights = folders.weight_files(folder)
    with folders.open_tensors(weights) as tensors:
        with files.blame(folder):
            names = format.table.match(tensors)
        with files.blame(folder / folders.CONFIG):
            declared: AnyModelConfig = format.config(settings, theirs, names.keys())
        if families and declared.family not in families:
            raise InputError(f"{source} is a {declared.family} model; needed is {' or '.join(families)}")
        config = _asked(declared, heads, labels, unnamed)
        if _classes(config) != _classes(declared):
            names = {known: name for known, name in names.items() if not known.startswith("classifier.")}
        model = _unfilled(config)
        try:
            asked = bool(heads or labels or unnamed)
            unread, fresh = format.table.unread(model, config, tensors, names, _HEADS if asked else ())
        except InputError as error:
            raise InputError(f"the tensors in {folder} do not fit its {folders.CONFIG}: {error}") from None
        model.eval()
        has_images = (folder / images.FILE).is_file()
        checkpoint = Checkpoint(
            model=model,
            tokenizer=_tokenizer(folder, config),
            images=ImageProcessor.load(folder) if has_images else None,
            fresh=fresh,
            files=tuple(weights),
        )
        yield _for_sentences(checkpoint, own), unread


def _for_sentences(checkpoint: Checkpoint, own: sentence.Found) -> Checkpoint:
    """The checkpoint with what a folder says of its vectors, if it is one of sentence-transformers."""
    config, tokenizer, pooling = checkpoint.model.config, checkpoint.tokenizer, own.pooling
    if tokenizer is not None and own.lowercase:
        tokenizer = tokenizer.lowercased()
    if pooling is not None and pooling.max_tokens is not None and isinstance(config, BertConfig):
        pooling = replace(pooling, max_tokens=min(pooling.max_tokens, config.context))
    makes_vectors = not (isinstance(config, BertConfig) and config.head in LABELLED)
    return replace(checkpoint, tokenizer=tokenizer, pooling=pooling if makes_vectors else None)


def _load_adapted(
    folder: Path,
    adapter: Adapter,
    families: Collection[Family],
    heads: tuple[BertHead, ...],
    labels: tuple[str, ...],
) -> Checkpoint:
    """The checkpoint that a folder's adapters belong to, with them in its weights."""
    values = adapter.heads == ("regression",)  # what a value is called says nothing of what it means
    other_head = heads and adapter.heads and not set(heads) & set(adapter.heads)
    other_labels = labels and adapter.labels and labels != adapter.labels and not values
    if other_head or other_labels:
        raise InputError(
            f"{folder} is an adapter with another head or other labels: write its whole model with "
            f"`qkv export {folder} FOLDER`, and begin from that"
        )
    with files.blame(folder / folders.ADAPTER):
        base_folder = folders.locate(adapter.base, adapter.revision)
        check_base(base_folder)
        names = labels or adapter.labels
        wanted = heads or adapter.heads
        with _opened_whole(adapter.base, base_folder, families, wanted, names, adapter.unnamed) as whole:
            base, unread = whole
            unread.into(base.model)
    config: AnyModelConfig = base.model.config
    try:
        adapters.merge(folder, adapter, base.model, config, _format_of(config).table, base.fresh)
    except InputError as error:
        raise InputError(f"the adapter in {folder} does not fit {adapter.base}: {error}") from None
    has_images = (folder / images.FILE).is_file()
    adapted = replace(
        base,
        tokenizer=_tokenizer(folder, config) or base.tokenizer,
        images=ImageProcessor.load(folder) if has_images else base.images,
        fresh=(),
        files=(*base.files, folder / folders.ADAPTER, folder / folders.ADAPTER_WEIGHTS),
    )
    own = sentence.read(folder)
    return _for_sentences(adapted, own if own.pooling else replace(own, pooling=base.pooling))


def _tokenizer(folder: Path, config: AnyModelConfig) -> Tokenizer | None:
    """The folder's tokenizer, if it has one. Raises InputError if it has ids that the model does not know."""
    if isinstance(config, ViTConfig) or not any((folder / name).is_file() for name in VOCABULARIES):
        return None
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} tokens, its model only "
            f"{config.vocab_size}: they do not belong together"
        )
    return tokenizer


def _asked(
    declared: AnyModelConfig, heads: tuple[BertHead, ...], labels: tuple[str, ...], unnamed: tuple[str, ...]
) -> AnyModelConfig:
    """The declared config with the head and the classes that the caller asks for.

    unnamed: names of the head's outputs, if nobody names as many.
    """
    if not heads and not labels and not unnamed:
        return declared
    declares = getattr(declared, "labels", ())
    kept = declares if not unnamed or len(declares) == len(unnamed) else ()
    if isinstance(declared, BertConfig):
        wanted = declared.head if not heads or declared.head in heads else heads[0]
        names = labels or (kept if wanted == declared.head else ())
        return replace(declared, head=wanted, labels=names or (unnamed if wanted in LABELLED else ()))
    if isinstance(declared, ViTConfig) and not heads:
        return replace(declared, labels=labels or kept or unnamed)
    raise InputError(f"a {declared.family} checkpoint has no head {heads[0] if heads else 'with labels'}")


def _classes(config: AnyModelConfig) -> tuple[str, tuple[str, ...]] | None:
    """What a classifier's weights mean: they fit no other head and no other classes."""
    if isinstance(config, BertConfig):
        # What a value is called says nothing of what it means.
        labels = ("",) * len(config.labels) if config.head == "regression" else config.labels
        return config.head, labels
    return (config.family, config.labels) if isinstance(config, ViTConfig) else None


class _Undrawn(TorchFunctionMode):
    """No random numbers are drawn: without contents to fill, torch would import its compiler for it."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in ("normal_", "uniform_", "kaiming_uniform_"):  # of tensors, and of torch.nn.init
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _unfilled(config: AnyModelConfig) -> Model:
    """A model with fresh heads, whose body waits for a checkpoint's tensors: none are drawn in vain."""
    body = config
    if isinstance(config, BertConfig):
        body = replace(config, head="none", labels=())
    elif isinstance(config, ViTConfig):
        body = replace(config, labels=())
    with torch.device("meta"), _Undrawn():
        model = build(body)
    # One number stands for all: memory comes with the checkpoint's tensors.
    allocate(model, lambda shape, dtype: torch.empty((), dtype=dtype, device="cpu").expand(shape))
    if isinstance(model, Transformer):
        model.position_table = model.sinusoids()  # on no disk
    elif isinstance(model, Bert) and isinstance(config, BertConfig):
        model.reset_head(config.head, config.labels)
    elif isinstance(model, ViT) and isinstance(config, ViTConfig):
        model.reset_head(config.labels)
    return model


# ---------------------------------------------------------------- adapting


def check_base(source: str | Path, fresh: Collection[str] = ()) -> None:
    """Raise InputError if adapters cannot belong to this checkpoint.

    It must not be an adapter itself, nor lack more (`fresh`, as in `Checkpoint`) than a classifier.
    """
    if adapters.read(folders.locate(source)) is not None:
        raise InputError(
            f"{source} is itself an adapter: write its whole model with `qkv export {source} FOLDER` first"
        )
    if untrained := [name for name in fresh if not name.startswith(HEAD)]:
        raise InputError(
            f"{source} has no {untrained[0].partition('.')[0]} head, and adapters alone cannot make one: "
            "train without lora.rank"
        )


def adapt(checkpoint: Checkpoint, config: LoraConfig, base: str) -> None:
    """Put fresh adapters into the model of a checkpoint that was loaded from `base`; only they and its
    classifier are trained from then on, and only they are saved.
    """
    model: AnyModelConfig = checkpoint.model.config
    rows = _format_of(model).table.layers(model)
    parts = {row.ours.removesuffix(".weight"): len(row.theirs) for row in rows}
    add_adapters(checkpoint.model, config, parts)
    checkpoint.base = base


# ---------------------------------------------------------------- saving


def _format_of(config: AnyModelConfig) -> Format[Any]:
    if isinstance(config, GPTConfig) and config.position == "rotary":
        return _FORMATS["persimmon"]
    if isinstance(config, GPTConfig):
        return _FORMATS["gpt2" if config.norm_first else "openai-gpt"]
    if isinstance(config, BertConfig):
        return _FORMATS["bert"]
    if isinstance(config, TransformerConfig):
        return _FORMATS["marian" if config.position == "sinusoidal" else "rotary_marian"]
    plain = config.stem == "patches" and config.position == "learned"
    return _FORMATS["vit" if plain else "extended_vit"]


def check_savable(config: AnyModelConfig) -> None:
    """Raise InputError if no format can express a model of this config; to be asked before training."""
    obstacle = _format_of(config).obstacle(config)
    if obstacle:
        raise InputError(f"such a model cannot be saved: {obstacle}")


def by_task(checkpoint: Checkpoint) -> dict[str, Checkpoint]:
    """The checkpoint of each task of a multi-task model by name; any other one under the name ""."""
    if not isinstance(checkpoint.model, MultiTaskBert):
        return {"": checkpoint}
    found = {}
    for task, model in checkpoint.model.tasks.items():
        pooling = CONTRASTIVE if model.config.head == "none" else None
        found[task] = replace(checkpoint, model=model, pooling=pooling)
    return found


def save(
    folder: str | Path, checkpoint: Checkpoint, write_weights: Callable[[Path], None] | None = None
) -> None:
    """Write a checkpoint's folder: config.json, model.safetensors, tokenizer and image settings, and the code
    of a model that transformers lacks.

    Of a model with adapters only what was learned: adapter_config.json, adapter_model.safetensors and
    labels.json instead of the first two. Of a multi-task model a folder a task, each with all of these.
    write_weights: puts the weights into a folder in another form than model.safetensors.

    It is written beside and moved into place, so a failure leaves what was there before; what a kill -9
    leaves, `folder.replace` says. Raises InputError if the config cannot be expressed, the disk is full,
    or the folder cannot be written.
    """
    writers = {name: _writer(one, write_weights) for name, one in by_task(checkpoint).items()}

    def write(staging: Path) -> None:
        for name, fill in writers.items():
            (staging / name).mkdir(exist_ok=True)
            fill(staging / name)

    folders.replace(files.expanded(folder), write)


def _writer(checkpoint: Checkpoint, write_weights: Callable[[Path], None] | None) -> Callable[[Path], None]:
    """What writes the files of a checkpoint into an empty folder. Raises InputError if it cannot be."""
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    config: AnyModelConfig = model.config
    check_savable(config)
    if checkpoint.pooling is not None and not isinstance(config, BertConfig):
        raise InputError(f"sentence-transformers' pooling is for bert, not {config.family}")
    format = _format_of(config)
    if checkpoint.base:
        weights = folders.ADAPTER_WEIGHTS
        texts, tensors = adapters.write(model, config, format, checkpoint.base)
    else:
        weights = folders.WEIGHTS
        tensors = {} if write_weights else format.table.save(model, config, format.bare(config))
        settings = {
            "model_type": format.model_type,
            **format.fields.write(config),
            **format.rest(config, tokenizer),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        }
        texts = {folders.CONFIG: settings, folders.GENERATION: format.generation(config)}

    def write(staging: Path) -> None:
        for name, values in texts.items():
            if values:
                files.write_json(staging / name, values)
        if write_weights is not None:
            write_weights(staging)
        else:
            save_file(tensors, staging / weights, metadata={"format": "pt"})
            # safetensors lets nobody else read its file; the folder's other files follow the user's umask.
            shutil.copymode(staging / next(iter(texts)), staging / weights)
        if format.code and not checkpoint.base:
            shutil.copyfile(_CODE / format.code, staging / format.code)
        if tokenizer is not None and not isinstance(config, ViTConfig):
            tokenizer.save(staging, context=config.context)
        if checkpoint.images is not None:
            checkpoint.images.save(staging)
        if checkpoint.pooling is not None and isinstance(config, BertConfig):
            sentence.write(staging, checkpoint.pooling, config)

    return write
