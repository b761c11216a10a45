"""Trackers hold what metrics.jsonl says: each runs for real, on this machine alone, and is read back."""

from __future__ import annotations

import json
import os
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import run_config

from qkv.checkpoint import CONFIG, read_metrics
from qkv.config import RunConfig, write_toml
from qkv.errors import InputError
from qkv.hub import Checkpoint
from qkv.job import new_job
from qkv.observe import Observer, Observers
from qkv.trackers import TRACKERS, TensorBoard, trackers
from qkv.train import train

NO_MODEL = Checkpoint(torch.nn.Module())
Points = dict[str, list[tuple[int, float]]]


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Of a run folder that was just begun."""
    config = run_config(tmp_path, "gpt", logging_steps=2, max_steps=8)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CONFIG).write_text(write_toml(config))
    return config


def follow(name: str, run: Path, config: RunConfig, after: int, until: int) -> None:
    """What a loop tells the tracker between two steps; the losses say which loop it was."""
    (tracker,) = trackers((name,), run)
    out = StringIO()
    with redirect_stdout(out), redirect_stderr(StringIO()):
        tracker.begin(config, after)
        for step in range(after + 1, until + 1):
            tracker.step(step, {"loss": after + step / 8, "tokens": 3.0})
        tracker.evaluated(until, {"loss": until / 4}, NO_MODEL)
        tracker.close()
    assert out.getvalue() == ""  # a command's standard output is its result


def leveldb_log(log: bytes, start: int) -> Iterator[bytes]:
    """The records of a log in LevelDB's format: blocks of fragments, each with checksum, length and kind."""
    record, place = b"", start
    while place + 7 <= len(log):
        left = -place % 32768
        if left < 7 and left:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", log, place)
        record += log[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last fragment
            yield record
            record = b""


def tensorboard_points(run: Path) -> Points:
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_has_the_records_of_metrics(tmp_path):
    run = tmp_path / "run"
    config = run_config(tmp_path, "vit", max_steps=7, logging_steps=2, eval_steps=3)
    train(new_job(config), run, Observers(trackers(("tensorboard",), run)))
    found = tensorboard_points(run)
    records = read_metrics(run)
    for name in ("loss", "grad_norm", "learning_rate", "tokens", "valid_loss", "valid_label_accuracy"):
        tag = name.replace("valid_", "valid/") if name.startswith("valid_") else f"train/{name}"
        expected = [(r["step"], pytest.approx(r[name], rel=1e-6)) for r in records if name in r]
        assert found[tag] == expected and expected, name


def test_tensorboard_forgets_what_a_resumed_run_does_again(tmp_path, config, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 9999)
    follow("tensorboard", tmp_path / "run", config, 0, 7)
    monkeypatch.setattr(os, "getpid", lambda: 10000)  # in the order of names before 9999
    follow("tensorboard", tmp_path / "run", config, 4, 8)
    found = tensorboard_points(tmp_path / "run")
    assert found["train/loss"] == [(1, 0.125), (2, 0.25), (4, 0.5), (6, 4.75), (8, 5.0)]
    assert found["valid/loss"] == [(8, 2.0)]


def test_trackio_goes_on_with_a_resumed_run(tmp_path, config, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    import trackio.sqlite_storage as storage

    monkeypatch.setattr(storage, "TRACKIO_DIR", tmp_path / "trackio")  # read once, when first imported
    follow("trackio", tmp_path / "run", config, 0, 4)
    follow("trackio", tmp_path / "run", config, 4, 8)
    (run,) = storage.SQLiteStorage.get_runs("qkv")
    logs = storage.SQLiteStorage.get_logs("qkv", run)
    losses = [(log["step"], log["train/loss"]) for log in logs if "train/loss" in log]
    assert run.startswith("run-")
    assert losses == [(1, 0.125), (2, 0.25), (4, 0.5), (6, 4.75), (8, 5.0)]
    assert [(log["step"], log["valid/loss"]) for log in logs if "valid/loss" in log] == [(4, 1.0), (8, 2.0)]


def test_wandb_writes_a_run_to_be_sent_later(tmp_path, config, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    from wandb.proto.wandb_internal_pb2 import Record

    follow("wandb", tmp_path / "run", config, 0, 4)
    (path,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")

    def points() -> Points:
        found: Points = {}
        for data in leveldb_log(path.read_bytes(), start=7):  # behind wandb's own mark
            record = Record()
            record.ParseFromString(data)
            values = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            for name in values.keys() & {"train/loss", "valid/loss"}:
                found.setdefault(name, []).append((values["_step"], values[name]))
        return found

    expected = {"train/loss": [(1, 0.125), (2, 0.25), (4, 0.5)], "valid/loss": [(4, 1.0)]}
    patience = time.monotonic() + 60  # a process of wandb's own writes the file
    while points() != expected and time.monotonic() < patience:
        time.sleep(0.1)
    assert points() == expected


def test_a_run_that_is_made_longer_keeps_its_name(tmp_path, config):
    (tracker,) = trackers(("trackio",), tmp_path / "run")
    name = tracker.name()
    os.utime(tmp_path / "run" / CONFIG, (1, 1))  # as if the file were edited
    (again,) = trackers(("trackio",), tmp_path / "run")
    assert again.name() == name


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_one_line(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, TRACKERS[name].package, None)
    with pytest.raises(InputError, match=rf"names {name}, which is not installed: pip install 'qkv\[log\]'"):
        trackers((name,), tmp_path)


def test_a_tracker_that_did_not_begin_can_be_closed(tmp_path):
    for tracker in trackers(tuple(TRACKERS), tmp_path):
        tracker.close()


class Lost(TensorBoard):
    """One that fails at the step's numbers, and when it is closed."""

    def log(self, values, step):
        raise ConnectionResetError("connection\nlost")

    def end(self):
        raise AssertionError("it is told no more")


def test_a_run_goes_on_without_a_tracker_that_fails(tmp_path):
    config = run_config(tmp_path, "gpt", max_steps=4, logging_steps=2)
    with pytest.warns(UserWarning, match="Lost failed and gets no more numbers of this run: connection lost"):
        assert train(new_job(config), tmp_path / "run", Lost(tmp_path / "run")).finished
    assert [r["step"] for r in read_metrics(tmp_path / "run") if "loss" in r] == [1, 2, 4]


class Heard(Observer):
    """Remembers the order in which observers hear."""

    def __init__(self, name: str, heard: list[str]) -> None:
        self.name, self.heard = name, heard

    def say(self, message):
        self.heard.append(f"{self.name} say {message}")

    def begin(self, config, step):
        self.heard.append(f"{self.name} begin {step}")

    def step(self, step, record):
        self.heard.append(f"{self.name} step {step}")

    def evaluated(self, step, scores, checkpoint):
        self.heard.append(f"{self.name} evaluated {step}")

    def close(self):
        self.heard.append(f"{self.name} close")


def test_all_observers_hear_the_same_in_order(tmp_path):
    heard: list[str] = []
    config = run_config(tmp_path, "vit", max_steps=2, eval_steps=2)
    train(new_job(config), tmp_path / "run", Observers([Heard("a", heard), Heard("b", heard)]))
    mine, others = ([h[2:] for h in heard if h.startswith(name)] for name in "ab")
    assert mine == others and mine[0].startswith("say") and [h[0] for h in heard] == ["a", "b"] * len(mine)
    assert mine[2:] == ["begin 0", "step 1", "step 2", "evaluated 2", "close"]
