"""Files on disk: settings read with errors that name the file, results written whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from qkv.errors import InputError


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


def expanded(location: str | Path) -> Path:
    """A path with ~ and ~user as the home they mean; as it is where there is no such user."""
    try:
        return Path(location).expanduser()
    except RuntimeError:
        return Path(location)


def json_or_empty(path: Path) -> Any:
    """A JSON file's content; an empty object if there is no file. Raises InputError if it is malformed."""
    return read_json(path) if path.is_file() else {}


def write_json(path: Path, value: object) -> None:
    """Write a JSON file for people to read, in a folder that is being made."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def blame(path: Path) -> Iterator[None]:
    """Around the use of what was read: whatever is wrong with it is an InputError that names the path."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{path} is malformed: {type(error).__name__} ({error})") from error


def visible(folder: Path, pattern: str) -> list[Path]:
    """Paths in a folder that match, in order; none that is hidden, or in a hidden folder, such as .git."""
    found = sorted(folder.glob(pattern))
    return [
        path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary_path)` and put the result in place of `path` only once it is on the disk.

    Raises InputError if the disk is full, the folder cannot be written, or what is written is not Unicode (as
    a name of a file may be); what was there before stays.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except (OSError, SafetensorError, UnicodeEncodeError) as error:
        with suppress(OSError):
            temporary.unlink()
        kept = "; the last complete file is kept" if path.exists() else ""
        raise InputError(f"cannot write {path}: {reason(error)}{kept}") from error


def replace_text(path: Path, text: str) -> None:
    """Put a small text file in place of what is there; errors as for `replace_file`."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a lock that ends with the process. Raises OSError if another holds it, or there are none."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def reason(error: OSError | SafetensorError | UnicodeEncodeError) -> str:
    """Why a file could not be written, in one line."""
    # safetensors reports errors of the system in words that end so.
    found = re.search(r"\(os error (\d+)\)", str(error))
    code = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    said = " ".join(str(error).split()) if code is None else os.strerror(code)
    return f"the disk is full ({said})" if code in (errno.ENOSPC, errno.EDQUOT) else said


def cache_folder() -> Path:
    """The user's folder for what can be made again: $QKV_CACHE, or qkv in $XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("QKV_CACHE"):
        return expanded(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qkv"


def measured(file: str, key: str, measure: Callable[[], float]) -> float:
    """A number of this machine, measured once and remembered under its key in a file of the cache folder.

    With a cache folder that is closed, it is measured every time.
    """
    path = cache_folder() / file
    known = _numbers(path)
    if key not in known:
        known[key] = measure()
        with suppress(InputError, OSError):
            replace_text(path, json.dumps(known, indent=2) + "\n")
    return known[key]


def _numbers(path: Path) -> dict[str, float]:
    """Those in the file; none if there is no such file, or if it is damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in values.items() if isinstance(v, float)} if isinstance(values, dict) else {}
