"""A full disk stops a run in one line; its last state is whole, and with room again it goes on exactly."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_kills import assert_same_run, recipe
from test_trackers import tensorboard_points

from qkv.cli import main
from qkv.config import write_toml
from qkv.errors import InputError
from qkv.hub import Checkpoint
from qkv.job import Job, new_job, resumed_job
from qkv.observe import Observer, Observers, Record
from qkv.report.run import RunReport
from qkv.trackers import TensorBoard
from qkv.train import train

MIB = 2**20
VARIANT = "adamw and a moving average"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={8 * MIB}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"this user may not mount a small file system ({mounted.stderr.strip()})")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


class Filler(Observer):
    """Fills a disk behind a step, or at the evaluation behind it, but for some bytes."""

    def __init__(self, disk: Path, step: int, left: int, at_evaluation: bool = False) -> None:
        self.file, self.at, self.left, self.at_evaluation = disk / "filler", step, left, at_evaluation

    def step(self, step: int, record: Record) -> None:
        if step == self.at and not self.at_evaluation:
            fill(self.file, self.left)

    def evaluated(self, step: int, scores: Record, checkpoint: Checkpoint) -> None:
        if step == self.at and self.at_evaluation:
            fill(self.file, self.left)


def fill(file: Path, left: int) -> None:
    file.write_bytes(bytes(shutil.disk_usage(file.parent).free - left))


def run(job: Job, folder: Path, *others: Observer, resume: bool = False) -> None:
    train(job, folder, Observers([*others, RunReport(job, folder)]), resume=resume)


# The best model has 78 kB, a state 180 kB or more; steps 2, 4, ... save one, steps 3, 6, ... are scored.
@pytest.mark.parametrize(
    ("filler", "what"),
    [
        ({"step": 1, "left": 0}, "cannot write .*metrics.jsonl: the disk is full"),
        ({"step": 4, "left": 40_000}, "step-000000004: the disk is full .* the state of step 2 is kept"),
        ({"step": 3, "left": 40_000}, "cannot save to .*run: the disk is full"),
        ({"step": 6, "left": 40_000}, "cannot save to .*the disk is full .* the checkpoint .*before is kept"),
        ({"step": 6, "left": 0, "at_evaluation": True}, "samples.jsonl: the disk is full .* file is kept"),
        ({"step": 6, "left": 8192, "at_evaluation": True}, "report.html: the disk is full .* file is kept"),
    ],
)
def test_whatever_finds_no_room_says_so_and_the_run_goes_on_when_there_is_some(filler, what, disk, tmp_path):
    config = recipe(tmp_path, VARIANT)
    run(new_job(config), tmp_path / "whole")
    with pytest.raises(InputError, match=what):
        run(new_job(config), disk / "run", Filler(disk, **filler))
    (disk / "filler").unlink()
    run(resumed_job(disk / "run"), disk / "run", resume=True)
    assert_same_run(tmp_path / "whole", disk / "run")


@pytest.mark.parametrize("left", [0, 40_000, 90_000, 190_000])
def test_the_command_ends_with_2_and_one_line(left, disk, tmp_path, monkeypatch, capsys):
    (tmp_path / "recipe.toml").write_text(write_toml(recipe(tmp_path, VARIANT)))
    fill(disk / "filler", left)
    monkeypatch.setattr(
        sys, "argv", ["qkv", "train", str(tmp_path / "recipe.toml"), "--out", str(disk / "run")]
    )
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert [line for line in said if "disk is full" in line] == said[-1:]
    (disk / "filler").unlink()
    if (disk / "run" / "config.toml").exists():
        monkeypatch.setattr(sys, "argv", ["qkv", "train", "--resume", str(disk / "run")])
    main()


def test_a_run_with_tensorboard_ends_on_a_full_disk_and_goes_on(disk, tmp_path):
    with pytest.raises(InputError, match="the disk is full"):
        run(
            new_job(recipe(tmp_path, VARIANT)),
            disk / "run",
            Filler(disk, 3, 0, at_evaluation=True),
            TensorBoard(disk / "run"),
        )
    (disk / "filler").unlink()
    run(resumed_job(disk / "run"), disk / "run", TensorBoard(disk / "run"), resume=True)
    assert [step for step, _ in tensorboard_points(disk / "run")["train/loss"]] == list(range(1, 13))


@pytest.mark.parametrize("place", ["file/run", "/proc/run"])
def test_a_folder_that_cannot_be_made_is_one_line(place, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*run"):
        run(new_job(recipe(tmp_path, VARIANT)), tmp_path / place)
