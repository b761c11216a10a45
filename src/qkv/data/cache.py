"""What takes long to make of the data, kept in memory-mapped files for the next run.

An entry is a folder, named by a hash of all that its arrays were made from. Each array is a raw binary
file; `index.json`, written last, says what they are and carries its own checksum. A folder whose index
is missing or broken, or whose files have other sizes, is made again. One process at a time makes an
entry, and others that want it, such as the ranks of one run, wait and then read it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from qkv.files import reason, sync

Columns = Mapping[str, np.ndarray]
"""Arrays by name."""
Chunks = Iterable[tuple[int, Columns]]
"""The next part of each array, to be laid end to end, and how much work making it was."""
Watch = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is to do."""

LIMIT_BYTES = 64 << 30
"""Entries that were not used for longest are dropped until the rest is no larger than this."""

_FORMAT = "1"
_INDEX = "index.json"


def cache_folder() -> Path:
    """Where entries are: $QKV_CACHE, or else qkv/data in $XDG_CACHE_HOME or in ~/.cache."""
    if chosen := os.environ.get("QKV_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qkv" / "data"


def fingerprint(*parts: str | bytes) -> str:
    """SHA-256 of the parts and of where each ends."""
    sha = hashlib.sha256()
    for part in parts:
        content = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        sha.update(len(content).to_bytes(8, "little") + content)
    return sha.hexdigest()


def unwatched(doing: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""


class Cache:
    """Arrays by the fingerprint of what they are made from."""

    def __init__(self, folder: Path | None, watch: Watch = unwatched) -> None:
        """folder: where entries are kept; None: nowhere, so that arrays are made in memory each time."""
        self.folder = folder
        self.watch = watch
        self.problem = ""
        """Why arrays are no longer kept in files; empty if all is well."""

    def get(
        self, made_from: str, made_by: str, chunks: Callable[[], Chunks], doing: str, total: int
    ) -> Columns:
        """The arrays, each at least one-dimensional, that the chunks give when they are laid end to end.

        made_from: fingerprint of the input and the settings. made_by: library and version, because others
        may give other arrays. doing, total: what to tell the watch. Where nothing can be kept, the arrays
        are made in memory.
        """
        kept = self.keep(made_from, made_by, chunks, doing, total)
        return _join(self._watched(chunks(), doing, total)) if kept is None else kept

    def keep(
        self, made_from: str, made_by: str, chunks: Callable[[], Chunks], doing: str, total: int
    ) -> Columns | None:
        """As `get`, but None where nothing can be kept; if that is because of the disk, `problem` says so."""
        if self.folder is None or self.problem:
            return None
        key = fingerprint(_FORMAT, made_from, made_by)
        try:
            return self._find(key) or self._make(key, self._watched(chunks(), doing, total))
        except (OSError, NotImplementedError) as error:  # NotImplementedError: there are no locks
            why = reason(error) if isinstance(error, OSError) else "its disk knows no file locks"
            self.problem = (
                f"Prepared data are not kept for the next run, because {self.folder} cannot be written: "
                f"{why}. Name another folder with QKV_CACHE."
            )
            return None

    def _watched(self, chunks: Chunks, doing: str, total: int) -> Iterator[Columns]:
        done = 0
        for amount, columns in chunks:
            yield columns
            done += amount
            self.watch(doing, done, total)

    def _find(self, key: str) -> Columns | None:
        """A whole entry's arrays, or None."""
        assert self.folder is not None
        entry = self.folder / key
        try:
            index = json.loads((entry / _INDEX).read_text(encoding="utf-8"))
            if index["check"] != _check(key, index["columns"]):
                return None
            columns = {name: _map(entry / name, *shape) for name, shape in index["columns"].items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None
        with suppress(OSError):  # a folder that can only be read
            os.utime(entry / _INDEX)
        return columns

    def _make(self, key: str, chunks: Iterator[Columns]) -> Columns:
        """Write an entry, unless another process does so first. Raises OSError if it cannot be done."""
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock(key):
            if found := self._find(key):
                return found
            entry = self.folder / key
            shutil.rmtree(entry, ignore_errors=True)
            try:
                _write(entry, key, chunks)
            except BaseException:
                shutil.rmtree(entry, ignore_errors=True)
                raise
            made = self._find(key)
        if made is None:
            raise OSError(f"{entry} changed while it was written")
        self._drop_old(key)
        return made

    def _lock(self, key: str, timeout: float = -1) -> FileLock:
        assert self.folder is not None
        return FileLock(self.folder / f"{key}.lock", timeout=timeout)

    def _drop_old(self, key: str) -> None:
        """Remove what was used least recently beyond the limit, and what killed processes left; not `key`."""
        assert self.folder is not None
        entries = [path for path in self.folder.iterdir() if path.is_dir() and path.name != key]
        total = _size(self.folder / key)
        for entry in sorted(entries, key=_last_used, reverse=True):
            total += _size(entry)
            if total > LIMIT_BYTES or not (entry / _INDEX).exists():
                with suppress(Timeout), self._lock(entry.name, timeout=0):  # not while it is being written
                    (entry / _INDEX).unlink(missing_ok=True)
                    shutil.rmtree(entry, ignore_errors=True)


def _check(key: str, columns: Any) -> str:
    """What an index must carry to be the one that was written for this key."""
    return fingerprint(key, json.dumps(columns))


def _map(path: Path, dtype: str, shape: list[int]) -> np.ndarray:
    """A file's array. Raises ValueError if it has another size."""
    if path.stat().st_size != math.prod(shape) * np.dtype(dtype).itemsize:
        raise ValueError(f"{path} is damaged")
    if not math.prod(shape):  # nothing cannot be mapped
        return np.zeros(shape, dtype)
    # Copy on write: torch wants writable arrays, and nothing reaches the file.
    return np.asarray(np.memmap(path, dtype, "c", shape=tuple(shape)))


def _write(entry: Path, key: str, chunks: Iterator[Columns]) -> None:
    """Each array end to end into a file of its own, and the index when all are on the disk."""
    entry.mkdir()
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        columns: dict[str, tuple[str, list[int]]] = {}
        for chunk in chunks:
            for name, array in chunk.items():
                if name not in files:
                    files[name] = stack.enter_context((entry / name).open("wb"))
                    columns[name] = (array.dtype.str, [0, *array.shape[1:]])
                dtype, shape = columns[name]
                assert (array.dtype.str, list(array.shape[1:])) == (dtype, shape[1:])
                files[name].write(np.ascontiguousarray(array).data)
                shape[0] += len(array)
    for name in columns:
        sync(entry / name)
    index = {"columns": columns, "check": _check(key, columns)}
    (entry / _INDEX).write_text(json.dumps(index), encoding="utf-8")
    sync(entry / _INDEX)


def _join(chunks: Iterator[Columns]) -> Columns:
    """Each array end to end in memory."""
    parts: dict[str, list[np.ndarray]] = {}
    for chunk in chunks:
        for name, array in chunk.items():
            parts.setdefault(name, []).append(array)
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _size(entry: Path) -> int:
    """Bytes of an entry; 0 if it is gone."""
    with suppress(OSError):
        return sum(path.stat().st_size for path in entry.iterdir())
    return 0


def _last_used(entry: Path) -> float:
    with suppress(OSError):
        return (entry / _INDEX).stat().st_mtime
    return 0.0


NO_CACHE = Cache(None)
"""For data that are looked at once."""
