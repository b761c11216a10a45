"""A signal ends a run behind the step in progress, a second one at once; both can be resumed exactly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_kills import assert_same_run, recipe
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from qkv import checkpoint, cli
from qkv.checkpoint import saved_states, step_of
from qkv.config import write_toml
from qkv.console import TrainingBar

VARIANT = "adamw and a moving average"  # saves every 2 steps of 12, scores every 3
STEP = 7


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> tuple[Path, Path]:
    """A recipe, and a run of it that was not interrupted."""
    folder = tmp_path_factory.mktemp("begun")
    (folder / "recipe.toml").write_text(write_toml(recipe(folder, VARIANT)))
    command("train", folder / "recipe.toml", "--out", folder / "whole")
    return folder / "recipe.toml", folder / "whole"


@pytest.fixture(autouse=True)
def usual_ctrl_c() -> Iterator[None]:
    """As in a process of its own: a browser that other tests used leaves a handler that does nothing."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def command(*arguments: object) -> int:
    """Run `qkv` in this process; its exit code."""
    before, sys.argv = sys.argv, ["qkv", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


def signals_at_step(*numbers: signal.Signals):
    """A `TrainingBar.step` that sends this process signals in step STEP."""

    def step(self: TrainingBar, step: int, record: object) -> None:
        for number in numbers if step == STEP else ():
            handler, deadline = signal.getsignal(number), time.monotonic() + 10
            signal.raise_signal(number)
            # Python runs handlers soon, but beside other threads not at once; each changes what comes next.
            while signal.getsignal(number) is handler and time.monotonic() < deadline:
                time.sleep(0.01)

    return step


def last_step(run: Path) -> int:
    return step_of(saved_states(run)[-1])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_says_how_to_go_on_and_ends(number, code, begun, tmp_path, monkeypatch, capsys):
    start, whole = begun
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(TrainingBar, "step", signals_at_step(number))
    assert command("train", start, "--out", tmp_path / "run") == code
    assert f"continue with: qkv train --resume {tmp_path / 'run'}" in capsys.readouterr().err
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert last_step(tmp_path / "run") == STEP
    assert command("train", "--resume", tmp_path / "run") == 0
    assert_same_run(whole, tmp_path / "run")


def test_a_second_ctrl_c_ends_at_once(begun, tmp_path, monkeypatch):
    start, whole = begun
    monkeypatch.setattr(TrainingBar, "step", signals_at_step(signal.SIGINT, signal.SIGINT))
    assert command("train", start, "--out", tmp_path / "run") == 130
    assert last_step(tmp_path / "run") == STEP - 1
    monkeypatch.undo()
    assert command("train", "--resume", tmp_path / "run") == 0
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize("place", ["tensors", "progress", "drop"])
def test_a_second_ctrl_c_while_a_state_is_saved_harms_none(place, begun, tmp_path, monkeypatch):
    start, whole = begun
    owner, name = {
        "tensors": (HuggingFaceStorageWriter, "write_data"),
        "progress": (checkpoint, "asdict"),
        "drop": (checkpoint.shutil, "rmtree"),
    }[place]
    usual = getattr(owner, name)
    sent = []

    def interrupted(*arguments, **settings):
        if not sent and last_step(tmp_path / "run") >= STEP - 1:
            sent.append(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return usual(*arguments, **settings)

    monkeypatch.setattr(
        TrainingBar, "begin", lambda self, config, step: monkeypatch.setattr(owner, name, interrupted)
    )
    monkeypatch.setattr(TrainingBar, "step", signals_at_step())
    assert command("train", start, "--out", tmp_path / "run") == 130
    assert sent
    monkeypatch.undo()
    assert command("train", "--resume", tmp_path / "run") == 0
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_second_sigterm_ends_at_once(first, begun, tmp_path):
    start, whole = begun
    program = (
        "import signal, sys; sys.path.insert(0, sys.argv.pop()); import test_interrupts as test; "
        "numbers = map(int, sys.argv.pop().split(',')); "
        "test.TrainingBar.step = test.signals_at_step(*map(signal.Signals, numbers)); "
        "test.cli.main()"
    )
    sent = f"{int(first)},{int(signal.SIGTERM)}"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            program,
            "train",
            str(start),
            "--out",
            str(tmp_path / "run"),
            sent,
            str(Path(__file__).parent),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    assert done.returncode == -signal.SIGTERM
    assert last_step(tmp_path / "run") == STEP - 1
    assert command("train", "--resume", tmp_path / "run") == 0
    assert_same_run(whole, tmp_path / "run")


def test_a_signal_in_the_last_step_changes_nothing(begun, tmp_path, monkeypatch):
    start, whole = begun
    monkeypatch.setattr(f"{__name__}.STEP", 12)
    monkeypatch.setattr(TrainingBar, "step", signals_at_step(signal.SIGINT))
    assert command("train", start, "--out", tmp_path / "run") == 0
    assert_same_run(whole, tmp_path / "run")
