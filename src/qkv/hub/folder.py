"""The folder of a checkpoint: found on disk or on the Hub, its tensors opened, and replaced as a whole."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qkv import images, tokenizers
from qkv.errors import InputError
from qkv.hub.table import Slice

CONFIG = "config.json"
GENERATION = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = "model-*.safetensors"
MODULES = "modules.json"
SENTENCE = "sentence_bert_config.json"

_MODEL_FILES = (CONFIG, WEIGHTS, INDEX, SHARDS, *tokenizers.FILES, images.FILE)
_FILES = (*_MODEL_FILES, GENERATION, MODULES, SENTENCE)
"""What a checkpoint may consist of, as patterns, but for the modules of sentence-transformers."""


# ---------------------------------------------------------------- finding


def locate(source: str | Path, revision: str | None = None) -> Path:
    """The folder itself, or that of a Hub id in the cache of huggingface_hub, downloaded if need be.

    Raises InputError if there is no such folder, or the id cannot be had.
    """
    path = Path(source).expanduser()
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if is_folder:
        if revision is not None:
            raise InputError(f"{path} is a folder; a revision belongs to a Hub id")
        return path
    if exists:
        raise InputError(f"{path} is a file; give the folder of a checkpoint")
    if not isinstance(source, str) or not re.fullmatch(r"[\w.-]*\w/[\w.-]+|\w[\w.-]*", source):
        raise InputError(f"no folder {path}")
    return _download(source, revision)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    # sentence-transformers once put the model into a folder of its own, as in 0_Transformer.
    patterns = [*_FILES, *(f"0_*/{file}" for file in _MODEL_FILES), "*_Pooling/config.json"]
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
    except (errors.HFValidationError, errors.HfHubHTTPError, OSError) as error:
        raise InputError(f"{name} cannot be fetched from the Hub: {' '.join(str(error).split())}") from None


def read_json(path: Path) -> Any:
    """A JSON file's content. Raises InputError if it is missing or malformed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent} has no {path.name}; is it the folder of a checkpoint?") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None


@contextmanager
def open_tensors(folder: Path) -> Iterator[dict[str, Slice]]:
    """All tensors of a folder's safetensors files, by name, read when they are indexed.

    Raises InputError if there are none, or a file is missing or broken.
    """
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        files = sorted(set(index.get("weight_map", {}).values()))
    elif (folder / WEIGHTS).is_file():
        files = [WEIGHTS]
    else:
        raise InputError(
            f"{folder} has no {WEIGHTS}; pickled weights such as pytorch_model.bin are never loaded, because "
            "loading them runs code: convert them with transformers' save_pretrained"
        )
    with ExitStack() as stack:
        tensors: dict[str, Slice] = {}
        for name in files:
            try:
                file = stack.enter_context(safe_open(folder / name, framework="pt"))
                tensors |= {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            except FileNotFoundError:
                raise InputError(f"{folder} has no {name}, which {INDEX} names") from None
            except (SafetensorError, OSError) as error:
                raise InputError(f"{folder / name} cannot be read: {error}") from None
        yield tensors


# ---------------------------------------------------------------- replacing


def replace(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill an empty folder, and put its files into `folder` only once all are on the disk.

    Files of a checkpoint that was there before go with it; others stay. Raises InputError if the disk is
    full or the folder cannot be written; what was there before is then untouched.
    """
    made = False
    try:
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as name:
            staging = Path(name)
            write(staging)
            _move(staging, folder)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        kept = "" if made else "; what was there before is kept"
        raise InputError(f"cannot save to {folder}: {reason}{kept}") from error


def _move(staging: Path, folder: Path) -> None:
    """Put all files of one folder into the other, in place of the checkpoint that is there."""
    names = {path.relative_to(staging) for path in staging.rglob("*") if path.is_file()}
    for name in names:
        _sync(staging / name)
    old = _checkpoint_files(folder)
    for name in sorted(names):
        (folder / name).parent.mkdir(exist_ok=True)
        (staging / name).replace(folder / name)
    for name in old - names:
        (folder / name).unlink()


def _checkpoint_files(folder: Path) -> set[Path]:
    """The files of the checkpoint in a folder; none if it holds something else."""
    if not ((folder / CONFIG).is_file() and ((folder / WEIGHTS).is_file() or (folder / INDEX).is_file())):
        return set()
    patterns: Iterable[str] = (*_FILES, "*_Pooling/config.json", "*_Normalize/config.json")
    return {path.relative_to(folder) for pattern in patterns for path in folder.glob(pattern)}


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
