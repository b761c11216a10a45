"""Trains in child processes that are killed, as a program for test_kills.

`python dying.py RECIPE FOLDER file KILLS` kills each run once, before a file operation; these are chosen
evenly among all that the run folder sees in a run, and every other time the file that was being written is
cut off. `python dying.py RECIPE FOLDER time KILLS` kills at random instants. Every run is resumed until it
ends. FOLDER then has `whole`, a run that was not killed, beside the others.

Children are forked, so that torch is imported once: nothing here may start a thread before.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import pydantic.main
import torch._dynamo
import torch.utils.tensorboard
from torch.distributed.checkpoint import hf_storage

from qkv.config import read_toml
from qkv.job import new_job, resumed_job
from qkv.observe import Observers
from qkv.report.run import RunReport
from qkv.trackers import TensorBoard
from qkv.train import train

_IMPORTED = (pydantic.main, torch._dynamo, torch.utils.tensorboard, hf_storage)
"""What takes children long to import."""
_CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}


class Death:
    """An audit hook that counts operations on files in a folder, and kills the process before one of them.

    cut: leave only half of what was written since the operation before, as if the process had died in
    the middle of that.
    """

    def __init__(self, folder: Path, at: int = 0, cut: bool = False) -> None:
        self.folder, self.at, self.cut = str(folder) + os.sep, at, cut
        self.operations = 0
        self.written: tuple[Path, int] | None = None
        """The file that the last operation opened for writing, and its size then."""

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _CHANGES or not self._inside(arguments):
            return
        self.operations += 1
        if self.operations == self.at:
            if self.cut and self.written:
                path, before = self.written
                os.truncate(path, before + (path.stat().st_size - before) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        self.written = None
        if event == "open" and set(str(arguments[1])) & set("wax+"):
            path = Path(arguments[0])
            appends = "a" in str(arguments[1]) and path.exists()
            self.written = (path, path.stat().st_size if appends else 0)

    def _inside(self, arguments: tuple[Any, ...]) -> bool:
        """Whether it is in the folder; shutil.rmtree names files relative to a folder that it opened."""
        path = str(arguments[0])
        return path.startswith(self.folder) or os.sep not in path


def start(recipe: Path, run: Path, death: Death) -> int:
    """Train in a new process, from the beginning or where the run was left; its process id."""
    if child := os.fork():
        return child
    code = 1
    try:
        sys.addaudithook(death)
        resume = (run / "config.toml").exists()
        job = resumed_job(run) if resume else new_job(read_toml(recipe))
        train(job, run, Observers([RunReport(job, run), TensorBoard(run)]), resume=resume)
        (run.parent / f"{run.name}.operations").write_text(str(death.operations))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(child: int) -> bool:
    """Whether the process ended by itself, which must be well; otherwise it was killed."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), f"a run ended with {code}"
    return code == 0


def main() -> None:
    recipe, folder, way, kills = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    began = time.monotonic()
    assert wait(start(recipe, folder / "whole", Death(folder / "whole")))
    seconds = time.monotonic() - began
    operations = int((folder / "whole.operations").read_text())
    for number in range(kills if way == "file" else 0):
        run = folder / f"run-{number}"
        at = 1 + number * operations // kills
        assert not wait(start(recipe, run, Death(run, at, cut=number % 2 == 1))), at
        assert wait(start(recipe, run, Death(run))), at
    rng, number = random.Random(0), 0
    while way == "time" and kills:
        run = folder / f"run-{number}"
        child = start(recipe, run, Death(run))
        time.sleep(rng.uniform(0.0, seconds))
        os.kill(child, signal.SIGKILL)
        if wait(child):
            number += 1
        else:
            kills -= 1
    if way == "time":
        assert wait(start(recipe, run, Death(run)))


if __name__ == "__main__":
    main()
