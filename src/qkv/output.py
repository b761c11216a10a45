"""Answers written to a file as they come: it is there once it is whole; until then, work can go on later."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from qkv.errors import InputError
from qkv.files import blame, locked, read_json, reason, replace_text, sync

SAVE_SECONDS = 10.0
"""How often it is noted how far the answers on the disk go: a kill loses no more than these seconds."""


def npy_header(rows: int, dim: int) -> bytes:
    """The beginning of a .npy file of float32 (rows, dim), of the same length for any number of rows."""
    from numpy.lib import format

    file = io.BytesIO()
    format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (rows, dim)})
    return file.getvalue()


class Output:
    """A file that is made of rows, used as a context manager.

    Rows go to PATH.part, which takes the place of PATH behind the last one. If the work ends before that and
    `made_from` says what it is made from, the part stays, and PATH.part.json beside it says what it is made
    from and how many rows are sure to be on the disk: the same work then begins with `done` rows. Raises
    InputError for a file that cannot be written, or a part that belongs to other work.
    """

    def __init__(self, path: Path, made_from: str | None = None, dim: int = 0) -> None:
        """dim: of rows of float32 in a .npy file; 0: a file of lines."""
        self.path = path
        self.part = path.with_name(f"{path.name}.part")
        self.about = path.with_name(f"{path.name}.part.json")
        self.dim = dim
        self.made_from = made_from
        self.at = (0, 0)
        """Rows that are written, and the bytes that they end at: one value, which Ctrl-C cannot split."""
        self.kept = 0
        """Rows that are noted as being on the disk."""

    def __enter__(self) -> Output:
        with ExitStack() as stack:
            with self._errors():
                self.file: BinaryIO = stack.enter_context(self.part.open("ab+"))
            try:
                stack.enter_context(locked(self.part))
            except BlockingIOError:
                raise InputError(f"another process is writing {self.part}") from None
            except OSError:
                pass  # a file system without locks
            with self._errors():
                self._begin()
            self._open = stack.pop_all()
        return self

    @property
    def done(self) -> int:
        """Rows that are written."""
        return self.at[0]

    def write(self, row: bytes) -> None:
        """Add a row."""
        with self._errors():
            self.file.write(row)
            self.at = (self.at[0] + 1, self.at[1] + len(row))
            if self.made_from is not None and time.monotonic() - self.saved > SAVE_SECONDS:
                self._save()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with self._errors():
                    self._finish()
            elif self.made_from is not None:
                with suppress(OSError, InputError):  # then what was noted before counts
                    self._save()
            else:
                self.part.unlink()
                self.about.unlink(missing_ok=True)
        finally:
            with suppress(OSError):  # what a full disk does not take is not noted either
                self._open.close()

    def _header(self, rows: int) -> bytes:
        """The beginning of a file of so many rows."""
        return npy_header(rows, self.dim) if self.dim else b""

    def _begin(self) -> None:
        """Go on behind the rows that are sure to be there, or begin."""
        self.at = self._found()
        if self.at[1]:
            self.file.truncate(self.at[1])
        else:
            self._note()  # before anything is in the part: it is ours
            self.file.truncate(0)
            header = self._header(0)
            self.file.write(header)
            self.at = (0, len(header))
        if self.made_from is not None:
            self._save()

    def _found(self) -> tuple[int, int]:
        """Rows of earlier work, and the bytes of the part that they end at."""
        if not (size := self.part.stat().st_size):
            return 0, 0
        if not self.about.exists():
            raise InputError(f"{self.part} is in the way, and was not begun by qkv: move it, or delete it")
        said = read_json(self.about)
        with blame(self.about):
            if said["made_from"] is None or not said["rows"]:  # cannot be gone on with, or need not
                return 0, 0
            if said["made_from"] != self.made_from:
                raise InputError(
                    f"{self.part} was made of another input, by another model or setting: go on with "
                    "the command that made it, or delete it"
                )
            if said["bytes"] > size:
                raise InputError(f"{self.part} has become shorter: delete it")
            return int(said["rows"]), int(said["bytes"])

    def _save(self) -> None:
        self.file.flush()
        sync(self.part)
        self._note()
        self.kept = self.done
        self.saved = time.monotonic()

    def _note(self) -> None:
        rows, size = self.at
        said = {"made_from": self.made_from, "rows": rows, "bytes": size}
        replace_text(self.about, json.dumps(said))

    def _finish(self) -> None:
        self.file.flush()
        with self.part.open("rb+") as file:
            file.write(self._header(self.done))
        sync(self.part)
        self.part.replace(self.path)
        self.about.unlink(missing_ok=True)
        sync(self.path.parent)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {reason(error)}") from error
