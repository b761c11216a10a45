"""The folder of a checkpoint: found on disk or on the Hub, its tensors opened, and replaced as a whole."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from qkv import files, images, tokenizers
from qkv.errors import InputError
from qkv.files import expanded
from qkv.hub.table import Stored

CONFIG = "config.json"
GENERATION = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = "model-*.safetensors"
ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
LABELS = "labels.json"
MODULES = "modules.json"
SENTENCE = "sentence_bert_config.json"
PROMPTS = "config_sentence_transformers.json"
CODE = "modeling_*.py"
ONNX = ("*.onnx", "*.onnx.data")

_MODEL_FILES = (CONFIG, WEIGHTS, INDEX, SHARDS, SENTENCE, *tokenizers.FILES, images.FILE)
_FILES = (*_MODEL_FILES, GENERATION, MODULES, PROMPTS, ADAPTER, ADAPTER_WEIGHTS)
"""What a checkpoint may consist of, as patterns, but for the modules of sentence-transformers."""
_WEIGHTS = (WEIGHTS, ADAPTER_WEIGHTS)
_STAGING = ".saving-"


# ---------------------------------------------------------------- finding


def holds_checkpoint(folder: Path) -> bool:
    """Whether there is a model in a folder."""
    return any((folder / name).exists() for name in (CONFIG, INDEX, *_WEIGHTS))


def locate(source: str | Path, revision: str | None = None) -> Path:
    """The folder itself, or that of a Hub id in the cache of huggingface_hub, downloaded if need be.

    Raises InputError if there is no such folder, or the id cannot be had.
    """
    path = expanded(source)
    try:
        is_folder, exists = path.is_dir(), path.exists()
        holds = is_folder and any((path / name).is_file() for name in (CONFIG, ADAPTER, MODULES))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if is_folder:
        if revision is not None:
            raise InputError(f"{path} is a folder; a revision belongs to a Hub id")
        if not holds:
            inside = sorted(str(file.parent) for file in path.glob(f"[!.]*/{CONFIG}"))
            if inside:
                raise InputError(f"{path} is a folder of models: name one of {', '.join(inside)}")
        return path
    if exists:
        raise InputError(f"{path} is a file; give the folder of a checkpoint")
    if not isinstance(source, str) or not re.fullmatch(r"[\w.-]*\w/[\w.-]+|\w[\w.-]*", source):
        raise InputError(f"no folder {path}")
    return _download(source, revision)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    # sentence-transformers once put the model into a folder of its own, as in 0_Transformer.
    patterns = [*_FILES, LABELS, *(f"0_*/{file}" for file in _MODEL_FILES)]
    patterns += ["*_Pooling/config.json", "*_Normalize/config.json"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError:
        raise InputError(
            f"{name} is gated: ask for access on its page and log in with `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"{name} is neither a folder nor a model on the Hub that you may see") from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{name} has no revision {revision}") from None
    except errors.LocalEntryNotFoundError:
        raise InputError(
            f"{name} is not a folder, not in the cache, and the Hub cannot be reached; check the connection"
        ) from None
    except Exception as error:  # connections that break off raise the plain Exceptions of the HTTP library
        raise InputError(f"{name} cannot be fetched from the Hub: {' '.join(str(error).split())}") from None


def weight_files(folder: Path, weights: str = WEIGHTS) -> list[Path]:
    """The safetensors files that a folder's tensors are in. Raises InputError if there are none."""
    if (folder / weights).is_file():  # an index beside it is of earlier weights
        return [folder / weights]
    if weights == WEIGHTS and (folder / INDEX).is_file():
        index = files.read_json(folder / INDEX)
        with files.blame(folder / INDEX):
            return sorted({folder / name for name in index["weight_map"].values()})
    if any(any(folder.glob(pattern)) for pattern in ONNX):
        raise InputError(f"{folder} is for ONNX Runtime: name the checkpoint that it was made of")
    raise InputError(
        f"{folder} has no {weights}; pickled weights such as pytorch_model.bin are never loaded, because "
        "loading them runs code: convert them with transformers' save_pretrained"
    )


@contextmanager
def open_tensors(paths: Sequence[Path]) -> Iterator[dict[str, Stored]]:
    """All tensors of a folder's safetensors files, by name, each read when it is asked for.

    Raises InputError if a file is missing or broken.
    """
    with ExitStack() as stack:
        tensors: dict[str, Stored] = {}
        for path in paths:
            try:
                # Of a file that is mapped, what was read would be in memory twice.
                file = stack.enter_context(safe_open(path, framework="pt", backend="pread"))
                tensors |= {name: Stored(file, name) for name in file.keys()}  # noqa: SIM118 - not a dict
            except FileNotFoundError:
                raise InputError(f"{path.parent} has no {path.name}, which {INDEX} names") from None
            except (SafetensorError, OSError) as error:
                raise InputError(f"{path} cannot be read: {error}") from None
        yield tensors


# ---------------------------------------------------------------- replacing


def replace(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill an empty folder, and put its files into `folder` only once all are on the disk.

    Files of a checkpoint that was there before go; others stay. Raises InputError if the disk is full or
    the folder cannot be written; what was there before is then untouched.

    Each file is replaced at once, the weights last, and only then go old files that have no successor. So a
    power cut or kill -9 leaves the old weights or all that is new, perhaps both; but the old weights can then
    be beside new settings and tokenizer, which makes no difference only while one and the same run saves. Of
    a folder of models, some can then be old and some new; a resumed run saves all of them again. What a
    killed process was writing goes with the next save.
    """
    made, kept = False, ""
    try:
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        old = _checkpoint_files(folder)
        kept = "; the checkpoint that was there before is kept" if old else ""
        with _staging(folder) as staging:
            write(staging)
            new = {path.relative_to(staging) for path in staging.rglob("*") if path.is_file()}
            for name in new:
                files.sync(staging / name)
            for name in sorted(new, key=lambda name: (_is_weights(name), name)):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (staging / name).replace(folder / name)
                kept = ""
            for leftover in old - new:  # last: they may be all the weights that there were
                (folder / leftover).unlink(missing_ok=True)
        for changed in {folder, *((folder / name).parent for name in new)}:
            files.sync(changed)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot save to {folder}: {files.reason(error)}{kept}") from error
    finally:
        if made:
            with suppress(OSError):  # it is not empty: all is well
                folder.rmdir()


def _is_weights(name: Path) -> bool:
    return name.name in _WEIGHTS or any(name.match(pattern) for pattern in ONNX)


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A new folder in that folder, locked; those of killed processes, whose locks are gone, go."""
    for stale in folder.glob(f"{_STAGING}*"):
        with suppress(OSError), files.locked(stale):
            shutil.rmtree(stale)
    with tempfile.TemporaryDirectory(prefix=_STAGING, dir=folder) as name, ExitStack() as stack:
        with suppress(OSError):  # a file system without locks: nothing of it is ever taken for stale
            stack.enter_context(files.locked(Path(name)))
        yield Path(name)


def _checkpoint_files(folder: Path) -> set[Path]:
    """The files of the checkpoint in a folder; none if it holds something else."""
    weights = (WEIGHTS, INDEX, *ONNX)
    whole = (folder / CONFIG).is_file() and any(any(folder.glob(pattern)) for pattern in weights)
    if not (whole or ((folder / ADAPTER).is_file() and (folder / ADAPTER_WEIGHTS).is_file())):
        return set()
    own = (*_FILES, LABELS) if (folder / ADAPTER).is_file() else _FILES  # else they are the user's
    patterns: Iterable[str] = (*own, CODE, *ONNX, "*_Pooling/config.json", "*_Normalize/config.json")
    return {path.relative_to(folder) for pattern in patterns for path in folder.glob(pattern)}
