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
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock

from qkv.files import reason, sync
from qkv.watch import Watch, unwatched

Columns = Mapping[str, np.ndarray]
"""Arrays by name."""
Chunks = Iterable[tuple[int, Columns]]
"""The next part of each array, to be laid end to end, and how much work making it was."""

LIMIT_BYTES = 64 << 30
"""Entries that were not used for longest are dropped until the rest is no larger than this."""

_FORMAT = "1"


def fingerprint(*parts: str | bytes) -> str:
    """SHA-256 of the parts and of where each ends."""
    sha = hashlib.sha256()
    for part in parts:
        content = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        sha.update(len(content).to_bytes(8, "little") + content)
    return sha.hexdigest()


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
        entry = _Entry(self.folder, fingerprint(_FORMAT, made_from, made_by))
        try:
            return entry.read() or entry.make(self._watched(chunks(), doing, total))
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


NO_CACHE = Cache(None)
"""For data that are looked at once."""


class _Entry:
    """One key's folder among those of a cache."""

    def __init__(self, cache: Path, key: str) -> None:
        self.cache = cache
        self.key = key
        self.folder = cache / key
        self.index = self.folder / "index.json"

    def read(self) -> Columns | None:
        """The arrays, or None if they are not there or damaged."""
        try:
            index = json.loads(self.index.read_text(encoding="utf-8"))
            if index["check"] != self._check(index["columns"]):
                return None
            columns = {name: _map(self.folder / name, *about) for name, about in index["columns"].items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None
        with suppress(OSError):  # a folder that can only be read
            os.utime(self.index)
        return columns

    def make(self, chunks: Iterator[Columns]) -> Columns:
        """The arrays, written unless another process does so first. Raises OSError if that cannot be done."""
        self.cache.mkdir(parents=True, exist_ok=True)
        with self._lock():
            if found := self.read():
                return found
            self._remove()
            try:
                self._write(chunks)
            except BaseException:
                self._remove()
                raise
            made = self.read()
        if made is None:
            raise OSError(f"{self.folder} changed while it was written")
        self._drop_others()
        return made

    def _write(self, chunks: Iterator[Columns]) -> None:
        """Each array end to end into a file of its own, and the index when all are on the disk."""
        self.folder.mkdir()
        columns: dict[str, tuple[str, list[int]]] = {}
        with ExitStack() as stack:
            files: dict[str, BinaryIO] = {}
            for chunk in chunks:
                for name, array in chunk.items():
                    if name not in files:
                        files[name] = stack.enter_context((self.folder / name).open("wb"))
                        columns[name] = (array.dtype.str, [0, *array.shape[1:]])
                    dtype, shape = columns[name]
                    assert (array.dtype.str, list(array.shape[1:])) == (dtype, shape[1:])
                    files[name].write(np.ascontiguousarray(array).data)
                    shape[0] += len(array)
        for name in columns:
            sync(self.folder / name)
        index = {"columns": columns, "check": self._check(columns)}
        self.index.write_text(json.dumps(index), encoding="utf-8")
        sync(self.index)

    def _check(self, columns: object) -> str:
        """What an index must carry to be the one that was written for this key."""
        return fingerprint(self.key, json.dumps(columns))

    def _remove(self) -> None:
        with suppress(OSError):
            self.index.unlink()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _lock(self, timeout: float = -1) -> FileLock:
        return FileLock(self.cache / f"{self.key}.lock", timeout=timeout)

    def _drop_others(self) -> None:
        """Remove what was used least recently beyond the limit, and what killed processes left."""
        names = [path.name for path in self.cache.iterdir() if path.is_dir()]
        # The user may have named a folder that has others in it.
        others = [_Entry(self.cache, name) for name in names if re.fullmatch("[0-9a-f]{64}", name)]
        total = self._size()
        for other in sorted(others, key=_Entry._last_used, reverse=True):
            if other.key != self.key:
                total += other._size()
                if total > LIMIT_BYTES or not other.index.exists():
                    # Not while it is being written, nor if it is another user's.
                    with suppress(OSError), other._lock(timeout=0):
                        if total > LIMIT_BYTES or not other.index.exists():
                            other._remove()

    def _size(self) -> int:
        """Bytes of all files; 0 if they are gone."""
        with suppress(OSError):
            return sum(path.stat().st_size for path in self.folder.iterdir())
        return 0

    def _last_used(self) -> float:
        with suppress(OSError):
            return self.index.stat().st_mtime
        return 0.0


def _map(path: Path, dtype: str, shape: list[int]) -> np.ndarray:
    """A file's array. Raises ValueError if it has another size."""
    if path.stat().st_size != math.prod(shape) * np.dtype(dtype).itemsize:
        raise ValueError(f"{path} is damaged")
    if not math.prod(shape):  # nothing cannot be mapped
        return np.zeros(shape, dtype)
    # Copy on write: torch wants writable arrays, and nothing reaches the file.
    return np.asarray(np.memmap(path, dtype, "c", shape=tuple(shape)))


def _join(chunks: Iterator[Columns]) -> Columns:
    """Each array end to end in memory."""
    parts: dict[str, list[np.ndarray]] = {}
    for chunk in chunks:
        for name, array in chunk.items():
            parts.setdefault(name, []).append(array)
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}
